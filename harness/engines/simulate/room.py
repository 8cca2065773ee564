"""``engine=simulate``: FastGen's scheduler over a cost model, no weights, no device."""

from __future__ import annotations

from harness.engines.room import Room
from harness.engines.simulate.config import SimulateConfig


class SimulateRoom(Room):
    """See :class:`Room`. It has no engine class: not built yet."""

    name = "simulate"
    config = SimulateConfig


ROOM = SimulateRoom()
