"""The keys of ``engine=fastgen``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Union

from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order


class Kernels(Enum):
    """What computes a pass: ``auto`` is deepspeed on CUDA, native on CPUs, torch elsewhere."""

    auto = "auto"
    deepspeed = "deepspeed"
    native = "native"
    torch = "torch"


@dataclass
class FastGenConfig(EngineConfig):
    """How full its passes are, how large its KV cache, and what computes them."""

    name: str = "fastgen"
    kernels: Kernels = Kernels.auto
    token_budget: int = 512
    max_sequences: int = 64
    order: Order = Order.longest_first
    kv_block_size: int = 64
    kv_memory: Union[int, float, str] = 0.3  # noqa: UP007 (OmegaConf reads typing.Union)
    quantization: str | None = None
