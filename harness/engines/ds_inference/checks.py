"""What ``engine=ds_inference`` refuses before anything is loaded, and which requests its rows cannot hold."""

from __future__ import annotations

from typing import cast

from harness.basics.errors import UserError
from harness.config.checks import check_counts
from harness.config.schema import Config
from harness.engines.ds_inference.config import DsInferenceConfig


def check(config: Config, accelerator: str) -> None:
    """Raises UserError for settings that cannot be, or not on this kind of device."""
    engine = cast(DsInferenceConfig, config.engine)
    check_counts({"engine.batch_size": engine.batch_size, "engine.batch_tokens": engine.batch_tokens})
    for name, asked in (("kernel_inject", engine.kernel_inject), ("cuda_graph", engine.cuda_graph)):
        if asked and accelerator != "cuda":
            raise UserError(
                f"engine.{name}",
                "true needs CUDA, and this run is on cpu",
                f"use engine.{name}=false",
            )
    if engine.cuda_graph and ((config.parallel.tp or 1) > 1 or engine.kernel_inject):
        raise UserError(
            "engine.cuda_graph",
            "true: DeepSpeed captures no graph of a model that is sharded or has injected kernels",
            "use engine.cuda_graph=false, or parallel.tp=1 and engine.kernel_inject=false",
        )


def row_width(batch_tokens: int, batch_size: int) -> int:
    """Returns the columns of a row where all batches share one size: with injected kernels and under a CUDA graph."""
    return batch_tokens // batch_size


def too_wide(width: int, prompt_tokens: int, output_len: int) -> str | None:
    """Returns why rows of ``width`` columns have no room for a request; None when they have."""
    if prompt_tokens + output_len <= width:
        return None
    return (
        f"prompt of {prompt_tokens} tokens + output_len {output_len} exceeds the {width} "
        f"columns of a row (engine.batch_tokens / engine.batch_size)"
    )
