"""Which models the C++ forward pass computes, told from a checkpoint's config alone and without torch."""

from __future__ import annotations

from typing import Any

from harness.engines.fastgen.runners.native.library import LARGEST_HEAD, VECTOR
from harness.engines.known_model import KnownModel
from harness.engines.shared import llama_like
from harness.machine.device import cpu_flags
from harness.models.architecture import attention_heads

INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
BFLOAT16 = "avx512_bf16"


def unsupported(known: KnownModel) -> str | None:
    """Returns, in one clause, why the pass cannot be computed here; None when it can."""
    dtype = known.dtype
    if dtype not in ("float32", "bfloat16"):
        return f"they compute in float32 or bfloat16, not in {dtype}"
    if (lacks := processor_lacks(dtype)) is not None:
        return lacks
    if known.tp > 1:
        return "they do not shard a model (parallel.tp)"
    return llama_like.unlike(known) or _unlike_sizes(known.architecture)


def processor_lacks(dtype: str) -> str | None:
    """Returns which instructions for a type this processor has not, in a clause; None when it has all."""
    flags, wanted = cpu_flags(), [*INSTRUCTIONS, *([BFLOAT16] if dtype == "bfloat16" else [])]
    missing = [name for name in wanted if name not in flags]
    return f"this processor has no {', '.join(missing)}" if missing else None


def slower(dtype: str) -> str | None:
    """Returns why PyTorch's kernels are expected to be faster here, None where they are not."""
    if dtype == "bfloat16" and "amx_bf16" in cpu_flags():
        return "this processor has amx_bf16, which PyTorch uses and they do not"
    return None


def _unlike_sizes(architecture: dict[str, Any]) -> str | None:
    for key in ("hidden_size", "intermediate_size"):
        if architecture[key] % VECTOR:
            return f"its {key} {architecture[key]} is not a multiple of {VECTOR}"
    heads, kv_heads, head_dim = attention_heads(architecture)
    if head_dim % VECTOR or head_dim > LARGEST_HEAD or heads % kv_heads:
        return f"{heads} query and {kv_heads} key-value heads of {head_dim}"
    return None
