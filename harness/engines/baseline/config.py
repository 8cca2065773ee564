"""The keys of ``engine=baseline``."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.key import key
from harness.config.schema import EngineConfig


@dataclass
class BaselineConfig(EngineConfig):
    """None: it is the committee's loop as it is."""

    name: str = key("baseline", "set by the option")
