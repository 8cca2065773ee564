"""The keys of ``engine=ds_inference``."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import EngineConfig


@dataclass
class DsInferenceConfig(EngineConfig):
    """How large its batches are, and what computes them."""

    name: str = "ds_inference"
    batch_size: int = 16
    batch_tokens: int = 32768
    kernel_inject: bool = False
    cuda_graph: bool = False
