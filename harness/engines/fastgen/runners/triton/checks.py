"""Which models the Triton pass computes, and where: told from a checkpoint's config alone and without torch."""

from __future__ import annotations

import importlib.util
import os

from harness.engines.fastgen.runners.triton.shard import row_share
from harness.engines.known_model import KnownModel
from harness.engines.shared import llama_like
from harness.engines.shared.ragged_kernels import PICKLED
from harness.models.architecture import LLAMA_LIKE, attention_heads

COMPUTED = llama_like.Computed(LLAMA_LIKE)
HEAD_SIZES = (64, 80, 96, 128)
DTYPES = ("float16", "bfloat16")
OLDEST_DEVICE = (8, 0)  # compute capability: bfloat16 and asynchronous copies
GGUF = "they are loaded from safetensors, and these weights are a GGUF file"
INTERPRETED = "TRITON_INTERPRET=1: triton kernels are interpreted on the CPU, to test them, thousands of times slower"


def interpreted() -> bool:
    """Whether Triton's interpreter stands for a device: it runs the kernels on the CPU, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(known: KnownModel) -> str | None:
    """Returns, in one clause, why the pass does not compute a model; None when it does."""
    if known.pickled:
        return PICKLED
    if known.gguf:
        return GGUF
    dtypes = (*DTYPES, "float32") if interpreted() else DTYPES
    if known.dtype not in dtypes:
        return f"they compute in {' or '.join(DTYPES)}, not in {known.dtype}"
    return llama_like.unlike(known, COMPUTED) or _unlike_sizes(known)


def not_installed() -> str | None:
    """Returns what the kernels lack on this machine; None when all is there."""
    return None if importlib.util.find_spec("triton") is not None else "the package triton is not installed"


def device_unsupported(capability: tuple[int, int]) -> str | None:
    """Returns why a CUDA device of this compute capability cannot run the kernels; None when it can."""
    if capability >= OLDEST_DEVICE:
        return None
    wanted, found = (".".join(map(str, version)) for version in (OLDEST_DEVICE, capability))
    return f"they need compute capability {wanted}, the device has {found}"


def _unlike_sizes(known: KnownModel) -> str | None:
    architecture, tp = known.architecture, known.tp
    heads, kv_heads, head_dim = attention_heads(architecture)
    if head_dim not in HEAD_SIZES:
        return f"its head size is {head_dim}, not one of {', '.join(map(str, HEAD_SIZES))}"
    if heads % kv_heads:
        return f"{heads} query and {kv_heads} key-value heads"
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        return f"{heads} query and {kv_heads} key-value heads cannot be split over {tp} ranks"
    inner, vocab = architecture["intermediate_size"], architecture["vocab_size"]
    if inner % tp:
        return f"its intermediate_size {inner} cannot be split over {tp} ranks"
    if row_share(vocab, tp) * (tp - 1) >= vocab:
        return f"its vocab_size {vocab} cannot be split over {tp} ranks"
    return None
