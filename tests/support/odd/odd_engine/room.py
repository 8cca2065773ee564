"""``engine=odd``: its keys, and where its class is."""

from __future__ import annotations

from dataclasses import dataclass

from harness.engines.simulate.config import SimulateConfig
from harness.engines.simulate.room import SimulateRoom


@dataclass
class OddConfig(SimulateConfig):
    """Its keys."""

    name: str = "odd"


class OddRoom(SimulateRoom):
    """Its declaration."""

    name = "odd"
    config = OddConfig
    engine = "odd_engine.engine:OddEngine"


ROOM = OddRoom()
