"""``engine=simulate``: FastGen's scheduler over a model of how long a pass takes, no weights, no device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.config.schema import Config
from harness.engines.fastgen.config import FastGenConfig
from harness.engines.fastgen.room import FastGenRoom
from harness.engines.fastgen.runners import choice
from harness.engines.known_model import KnownModel
from harness.engines.room import Here
from harness.engines.simulate import checks
from harness.engines.simulate.config import SimulateConfig

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings


class SimulateRoom(FastGenRoom):
    """See :class:`Room`. It refuses what FastGen would refuse on the described machine."""

    name = "simulate"
    config = SimulateConfig
    engine = "harness.engines.simulate.engine:SimulateEngine"
    scores = False
    simulates = True
    resume_keys = ("eos_rate",)
    proof_keys = None

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config)

    def check_shards(self, config: Config, known: KnownModel, accelerator: str) -> None:
        """As FastGen with the kernels that it would choose."""
        choice.check(FastGenConfig(), known, accelerator)

    def here(self, settings: EngineSettings[Any], capability: tuple[int, int] | None) -> Here:
        """It computes nothing."""
        return Here("simulated")


ROOM = SimulateRoom()
