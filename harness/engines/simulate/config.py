"""The keys of ``engine=simulate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order

AUTO = "auto"


@dataclass
class SimulateConfig(EngineConfig):
    """FastGen's keys with its defaults, so that a sweep over both compares the same settings; when outputs end; pace.

    ``eos_rate`` is the chance that an output token is an end-of-sequence token, ``auto`` that of ``hardware.fit``.
    ``pace`` is real seconds for a simulated one.
    """

    name: str = "simulate"
    token_budget: int = 512
    max_sequences: int = 64
    order: Order = Order.longest_first
    kv_block_size: int = 64
    kv_memory: Union[int, float, str] = 0.3  # noqa: UP007 (OmegaConf reads typing.Union)
    eos_rate: Union[int, float, str, None] = AUTO  # noqa: UP007
    pace: float = 0.0
