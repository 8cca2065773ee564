"""Hydra's ``hydra/launcher=slurm``: every job of a sweep is a Slurm job of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.deepspeed_launcher import DeepSpeedLauncher  # type: ignore[import-untyped]
from omegaconf import DictConfig

from harness.running.slurm import settings

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction

ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=settings.SlurmSettings, provider="harness")


class SlurmLauncher(DeepSpeedLauncher):
    """Has the sweep run its jobs on a cluster; what a job is, is the same.

    Args:
        given: the values of :class:`~harness.running.slurm.settings.SlurmSettings`.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.settings = settings.SlurmSettings(**given)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what is needed to compose and submit jobs; raises UserError for what no cluster takes."""
        settings.check(self.settings)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        from harness.running.slurm.jobs import SlurmJobs

        self.sweep.elsewhere = SlurmJobs(self.settings, self.sweep)

    def _lengthened(self, words: list[str]) -> list[str]:
        """Returns nothing: how long a trial takes there, this machine cannot tell."""
        return []
