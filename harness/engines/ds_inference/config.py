"""The keys of ``engine=ds_inference``."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.key import key
from harness.config.schema import EngineConfig


@dataclass
class DsInferenceConfig(EngineConfig):
    """How large its batches are, and what computes them."""

    name: str = key("ds_inference", "set by the option")
    batch_size: int = key(16, "most sequences in a batch", unit="rows")
    batch_tokens: int = key(
        32768, "most tokens in a batch, prompts padded to the longest, outputs included", unit="tokens"
    )
    kernel_inject: bool = key(
        False, "DeepSpeed's fused layers in place of the model's (CUDA; llama with as many key-value as query heads)"
    )
    cuda_graph: bool = key(False, "capture the decode step (CUDA, one rank a model, no `kernel_inject`)")
