"""``engine=toy``: its keys, its checks, and where its class is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from harness.config.checks import check_counts
from harness.config.schema import Config, EngineConfig
from harness.engines.room import Room


@dataclass
class ToyConfig(EngineConfig):
    """Its keys."""

    name: str = "toy"
    reply: int = 5
    work_s: float = 0.0
    added: float = 0.0


class ToyRoom(Room):
    """Its declaration."""

    name = "toy"
    config = ToyConfig
    engine = "toy_engine.engine:ToyEngine"
    scores = False

    def check(self, config: Config, accelerator: str) -> None:
        """The reply is a token's id."""
        check_counts({"engine.reply": cast(ToyConfig, config.engine).reply})


ROOM = ToyRoom()
