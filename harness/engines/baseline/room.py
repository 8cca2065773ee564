"""``engine=baseline``: the committee's loop."""

from __future__ import annotations

from harness.config.schema import Config
from harness.engines.baseline import checks
from harness.engines.baseline.config import BaselineConfig
from harness.engines.room import Passes, Room, Share


class BaselineRoom(Room):
    """See :class:`Room`."""

    name = "baseline"
    config = BaselineConfig
    engine = "harness.engines.baseline.engine:BaselineEngine"
    shards = False
    spreads = True
    passes = Passes.requests

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config)

    def share(self, config: Config) -> Share:
        """One request at a time."""
        return Share(tokens=1)


ROOM = BaselineRoom()
