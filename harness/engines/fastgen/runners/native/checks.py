"""Which models the C++ forward pass computes, told from a checkpoint's config alone and without torch."""

from __future__ import annotations

from typing import Any

from harness.engines.fastgen.runners.native.library import LARGEST_HEAD, VECTOR
from harness.engines.known_model import KnownModel
from harness.machine.device import cpu_flags
from harness.models.architecture import LLAMA_LIKE, attention_heads, not_plain, rotary_settings, rotary_types

# The others' frequencies change with the length of the sequence (dynamic, longrope).
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
BFLOAT16 = "avx512_bf16"


def unsupported(known: KnownModel) -> str | None:
    """Returns, in one clause, why the pass cannot be computed here; None when it can."""
    dtype = known.dtype
    if dtype not in ("float32", "bfloat16"):
        return f"they compute in float32 or bfloat16, not in {dtype}"
    flags, wanted = cpu_flags(), [*INSTRUCTIONS, *([BFLOAT16] if dtype == "bfloat16" else [])]
    missing = [name for name in wanted if name not in flags]
    if missing:
        return f"this processor has no {', '.join(missing)}"
    if known.tp > 1:
        return "they do not shard a model (parallel.tp)"
    if not known.architecture:
        return "its config is not known before it is downloaded"
    return _unlike(known.architecture, known.dummy, known.remote_code)


def slower(dtype: str) -> str | None:
    """Returns why PyTorch's kernels are expected to be faster here, None where they are not."""
    if dtype == "bfloat16" and "amx_bf16" in cpu_flags():
        return "this processor has amx_bf16, which PyTorch uses and they do not"
    return None


def _unlike(architecture: dict[str, Any], dummy: bool, remote_code: bool) -> str | None:
    family = architecture.get("model_type")
    if family not in LLAMA_LIKE:
        return f"{family} is not one of the families that they compute ({', '.join(LLAMA_LIKE)})"
    # Made-up weights are drawn without the checkpoint's code.
    reason = not_plain(architecture, dummy=dummy, remote_code=remote_code and not dummy)
    if reason is not None:
        return reason
    for key in ("hidden_size", "intermediate_size"):
        if architecture[key] % VECTOR:
            return f"its {key} {architecture[key]} is not a multiple of {VECTOR}"
    heads, kv_heads, head_dim = attention_heads(architecture)
    if head_dim % VECTOR or head_dim > LARGEST_HEAD or heads % kv_heads:
        return f"{heads} query and {kv_heads} key-value heads of {head_dim}"
    for rope_type in sorted(rotary_types(architecture) - set(ROPE_TYPES)):
        return f"its rotary embedding is scaled ({rope_type}; {', '.join(ROPE_TYPES)} are possible)"
    if any(
        (entry.get("partial_rotary_factor") or 1.0) != 1.0 for entry in (architecture, *rotary_settings(architecture))
    ):
        return "only a part of each head is rotated (partial_rotary_factor)"
    if architecture.get("hidden_act", "silu") != "silu":
        return f"its hidden_act is {architecture['hidden_act']}, not silu"
    if architecture.get("mlp_bias"):
        return "it has mlp_bias"
    return None
