"""What ``engine=ds_inference`` refuses before anything is loaded, and which requests its rows cannot hold."""

from __future__ import annotations

from typing import Any, cast

from harness.basics.errors import UserError
from harness.config.checks import check_counts
from harness.config.schema import Config
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.shared.ragged_kernels import built_in, no_compiler
from harness.models.architecture import attention_heads

NOT_INJECTED = "use engine.kernel_inject=false, or engine=fastgen"


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


def check_injection(architecture: dict[str, Any], tp: int) -> None:
    """Raises UserError for a model that DeepSpeed's kernel injection is known not to compute.

    Source: ``deepspeed/module_inject/containers/llama.py`` (no ``num_kv``: as many key-value as query heads; rotary
    embeddings from ``rope_theta`` alone) and ``replace_policy.py``.
    """
    reason = None
    if architecture.get("model_type") != "llama":
        reason = f"has no kernels for {architecture.get('model_type')} models"
    else:
        heads, kv_heads, head_dim = attention_heads(architecture)
        if heads != kv_heads:
            reason = f"has no grouped heads, the model has {heads} query and {kv_heads} key-value heads"
        elif heads % tp:
            reason = f"cuts heads evenly, {heads} do not go into {tp} ranks"
        elif head_dim * heads != architecture["hidden_size"]:
            reason = f"takes heads of {architecture['hidden_size'] // heads}, the model's are of {head_dim}"
        elif architecture.get("attention_bias") or architecture.get("mlp_bias"):
            reason = "drops the biases of this model"
    if reason is not None:
        raise UserError("engine.kernel_inject", f"true: DeepSpeed's kernel injection {reason}", NOT_INJECTED)


def check_injection_here() -> None:
    """Raises UserError where the injected kernels were never compiled, and cannot be."""
    if not built_in("ops/transformer/inference", "transformer_inference_op") and (lack := no_compiler()) is not None:
        raise UserError("engine.kernel_inject", f"true: {lack}", NOT_INJECTED)


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
