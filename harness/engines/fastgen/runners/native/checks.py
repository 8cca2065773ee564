"""Which models the C++ forward pass computes, and with which instructions: told without torch.

Of a model it needs a checkpoint's config alone.
"""

from __future__ import annotations

import os
from typing import Any

from harness.basics.errors import UserError
from harness.engines.fastgen.runners.native.library import LARGEST_HEAD, WIDTH
from harness.engines.known_model import KnownModel
from harness.engines.shared import llama_like
from harness.machine.device import cpu_flags
from harness.models.architecture import LLAMA_LIKE, attention_heads

COMPUTED = llama_like.Computed((*LLAMA_LIKE, "granite", "phi3", "olmo2", "gemma"), ("silu", "gelu_pytorch_tanh"))
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
# What the sources are compiled for, the fastest first, and what each needs of a processor. Without avx512_bf16 bfloat16
# is computed in float32, from bfloat16 weights.
INSTRUCTION_SETS = {
    "amx_bf16": (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*AVX512, "avx512_bf16"),
    "avx512": AVX512,
    "avx2": ("avx2", "fma"),
}
BFLOAT16_ALONE = ("amx_bf16",)  # what computes in bfloat16 and nothing else
VARIABLE = "HARNESS_CPU_ISA"  # the fastest that may be used


def unsupported(known: KnownModel) -> str | None:
    """Returns, in one clause, why the pass cannot be computed here; None when it can."""
    dtype = known.dtype
    if dtype not in ("float32", "bfloat16"):
        return f"they compute in float32 or bfloat16, not in {dtype}"
    if (lacks := processor_lacks()) is not None:
        return lacks
    if known.tp > 1:
        return "they do not shard a model (parallel.tp)"
    return llama_like.unlike(known, COMPUTED) or _unlike_sizes(known.architecture)


def instruction_set(dtype: str = "bfloat16") -> str | None:
    """Returns the fastest of :data:`INSTRUCTION_SETS` that this processor has for a type, None where it has none.

    ``HARNESS_CPU_ISA`` leaves out those before the one that it names.

    Raises:
        UserError: it names none.
    """
    names = list(INSTRUCTION_SETS)
    wish = os.environ.get(VARIABLE) or names[0]
    if wish not in names:
        raise UserError(VARIABLE, f"{wish!r} is not known", f"choose one of {', '.join(names)}, or leave it unset")
    flags, left = cpu_flags(), names[names.index(wish) :]
    able = (name for name in left if dtype == "bfloat16" or name not in BFLOAT16_ALONE)
    return next((name for name in able if flags.issuperset(INSTRUCTION_SETS[name])), None)


def processor_lacks() -> str | None:
    """Returns which instructions this processor has not, in a clause; None when it has enough. Raises UserError."""
    if instruction_set() is not None:
        return None
    flags, least = cpu_flags(), list(INSTRUCTION_SETS)[-1]
    return f"this processor has no {', '.join(name for name in INSTRUCTION_SETS[least] if name not in flags)}"


def _unlike_sizes(architecture: dict[str, Any]) -> str | None:
    for key in ("hidden_size", "intermediate_size"):
        if architecture[key] % WIDTH:
            return f"its {key} {architecture[key]} is not a multiple of {WIDTH}"
    heads, kv_heads, head_dim = attention_heads(architecture)
    if head_dim % WIDTH or head_dim > LARGEST_HEAD or heads % kv_heads:
        return f"{heads} query and {kv_heads} key-value heads of {head_dim}"
    return None
