"""The keys of ``engine=simulate``."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import EngineConfig


@dataclass
class SimulateConfig(EngineConfig):
    """None yet."""

    name: str = "simulate"
