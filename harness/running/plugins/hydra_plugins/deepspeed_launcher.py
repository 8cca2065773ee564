"""Hydra's ``hydra/launcher=deepspeed``: every job of a sweep is a ``deepspeed`` launch of its own.

Hydra looks for plugins in a package of this name; :func:`harness.config.compose.register` puts the directory above
it on ``sys.path``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from harness.basics.errors import UserError, quoted
from harness.config.checks import check_whole_or_auto
from harness.config.compose import check_choices, without_hydra
from harness.running import engine_sweep
from harness.running.sizes import KEYS as SIZES

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction

    from harness.running.sweep import Sweep


# No settings: a job's are in its config.
ConfigStore.instance().store(
    group="hydra/launcher",
    name="deepspeed",
    node={"_target_": "hydra_plugins.deepspeed_launcher.DeepSpeedLauncher"},
    provider="harness",
)


class DeepSpeedLauncher(Launcher):
    """Hands the jobs that a sweeper makes up to the :class:`~harness.running.sweep.Sweep` of the task function."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what is needed to compose jobs; Hydra calls it once."""
        if config.sweep.confirm or config.sweep.save_as is not None:
            from harness.running import tune

            tune.check(without_hydra(config))
        trials = config.hydra.sweeper.get("n_trials")
        if trials is not None and trials < 1:
            raise UserError("hydra.sweeper.n_trials", str(trials), "give a whole number of at least 1")
        if "optuna" in sys.modules:  # its sweeper is there; its own log would tear the display
            logging.getLogger("optuna").setLevel(logging.WARNING)
        try:
            Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # not every sweeper makes it
        except OSError as error:
            found = f"{quoted(str(config.results_dir), 300)} cannot be written: {error.strerror}"
            raise UserError("results_dir", found, "set another directory") from error
        self.sweep: Sweep = vars(task_function)["sweep"]
        self.context = hydra_context
        self.config = config
        self.longer: list[str] | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs; the value of each is its ``total_tokens_per_s``, 0 for one that failed."""
        setup_globals()
        jobs = engine_sweep.jobs(job_overrides)
        for note in jobs.notes:
            self.sweep.say(note)
        asked = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        keys = (override.get_key_element() for override in asked if not override.is_sweep_override())
        trials = self.config.hydra.sweeper.get("n_trials") or 0  # a search asks for one job after the other
        self.sweep.plan(max(initial_job_idx + len(set(jobs.same)), trials), set(map(engine_sweep.plain, keys)))
        self.sweep.composed, self.sweep.compose = without_hydra(self.config), self._compose
        configs = [self._load(words) for words in jobs.words]  # what makes no sense is refused before the first job
        more = self._lengthened(jobs.words[0])
        own = {}
        for number, words in enumerate(jobs.words):
            if jobs.same[number] == number:
                config = self._load([*words, *more]) if more else configs[number]
                own[number] = self.sweep.add([*words, *more], _without_hydra(config), self.sweep.varied(words))
        self.sweep.run(list(own.values()))
        returns: list[JobReturn] = []
        for number, words in enumerate(jobs.words):
            returned = JobReturn(overrides=words, status=JobStatus.COMPLETED)
            returned.return_value = own[jobs.same[number]].rate
            returns.append(returned)
        return returns

    def _lengthened(self, words: list[str]) -> list[str]:
        """Returns what each trial of a search gets so that it takes some time; found out before the first."""
        if not self.config.sweep.confirm:
            return []
        if self.longer is None:
            from harness.running import lengthening

            varied = self.sweep.varied(words)
            common = [word for word in words if word not in varied]
            self.longer = lengthening.longer(self.sweep.full_error, common, self._compose, self.sweep.say)
        return self.longer

    def _load(self, overrides: list[str]) -> DictConfig:
        composed = self.context.config_loader.load_sweep_config(self.config, overrides)
        check_choices(composed.hydra.runtime.choices)
        sizes = {f"engine.{key}": composed.engine[key] for key in SIZES if key in composed.engine}
        check_whole_or_auto(sizes)
        return composed

    def _compose(self, overrides: list[str]) -> DictConfig:
        return _without_hydra(self._load(overrides))


def _without_hydra(composed: DictConfig) -> DictConfig:
    """Returns a job's own config; Hydra's part of it is this job's from now on."""
    HydraConfig.instance().set_config(composed)
    return without_hydra(composed)
