"""The keys of ``engine=mii``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order


@dataclass
class MiiConfig(EngineConfig):
    """MII's own defaults, and the order in which a user of it would send the requests."""

    name: str = "mii"
    token_budget: int = 768
    max_sequences: int = 512
    order: Order = Order.dataset
    kv_memory: Union[int, float, str] = 0.9  # noqa: UP007 (OmegaConf reads typing.Union)
    quantization: str | None = None
