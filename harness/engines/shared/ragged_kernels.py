"""Which models DeepSpeed's ragged kernels compute correctly.

Answers come from a checkpoint's config alone and without torch, so that an impossible run is refused at once and
``kernels: auto`` knows what to take. The limits were read in DeepSpeed 0.19.8; the paths in the comments
start at ``deepspeed/inference/v2``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.engines.known_model import KnownModel
from harness.models.architecture import attention_heads, not_plain, rotary_settings, rotary_types

# Families whose decoder is model_implementations/{llama_v2,mistral,qwen_v2,phi3}. The engine has others (opt, falcon,
# phi, mixtral, ...), whose norms, biases or experts this harness has not checked.
FAMILIES = ("llama", "mistral", "qwen2", "phi3")
# kernels/ragged_ops/blocked_flash/blocked_flash.py, BlockedFlashAttn
DTYPES = ("float16", "bfloat16")
# kernels/ragged_ops/linear_blocked_kv_rotary/blocked_kv_rotary.py, BlockedRotaryEmbeddings
HEAD_DIMS = (64, 80, 96, 128)
QUERY_RATIOS = (1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71)
# Those that are fixed frequencies and nothing else: DeepSpeedRunner hands the kernel Hugging Face's frequencies. The
# others also scale cosine and sine (yarn, longrope), or change with the length of the sequence (dynamic).
ROPE_TYPES = ("default", "linear", "llama3")
# kernels/core_ops/cuda_rms_norm/rms_norm_cuda.cu, launch_rms_norm: beyond the last branch it computes nothing, and
# from 129 to 256 columns it adds up over half a warp as if it were a whole one.
HIDDEN_PARTIAL_WARP = (128, 256)
HIDDEN_MOST = 16384
# kernels/core_ops/gated_activations/gated_activation_kernels_cuda.cu: 7 steps of 1024 threads x 8 values, two an output
INTERMEDIATE_MOST = 7 * 1024 * 8 // 2
# model_implementations/sharding/types.py, DEFAULT_SHARD_GRANULARITY; asserted without tensor parallelism too
INTERMEDIATE_GRANULE = 32
# kernels/core_ops/bias_activations/bias_activation.py, which modules/implementations/unembed builds for the vocabulary
VOCABULARY_GRANULE = 8
# kernels/core_ops/cuda_linear/cuda_linear.py, CUDAWf6Af16Linear
FP6 = "wf6af16"
FP6_OUT_GRANULE, FP6_IN_GRANULE = 256, 64
# A pass's tokens: kernels/ragged_ops/embed launches a row of blocks for each, and CUDA has 65,535; gated_activation_
# kernels_cuda.cu numbers rows x columns in int32, and there are up to 57,344 columns.
TOKENS_MOST = 32768
SMALLEST_ATOM = 64  # tokens; kernels/ragged_ops/blocked_flash/blocked_flash.py, get_q_block_size
# kernels/ragged_ops/blocked_flash/blocked_flash.cpp: 8.x and 9.0, what the prebuilt attention has code for
SM_MAJORS = (8, 9)
PICKLED = "they are loaded from safetensors, and these weights are pickled (model.allow_pickle)"
# Since this version kv_trained_rotary_embeddings reads float32 frequencies whatever the activations' type.
OLDEST = (0, 19, 3)


def unsupported(known: KnownModel, quantization: str | None = None) -> str | None:
    """Returns, in one clause, why the kernels cannot compute a model correctly; None when they can.

    Args:
        quantization: None or ``wf6af16``.
    """
    architecture, dtype, tp = known.architecture, known.dtype, known.tp
    family = architecture.get("model_type")
    if known.pickled:
        return PICKLED
    if not architecture:
        return "its config is not known before it is downloaded"
    if family not in FAMILIES:
        return f"{family} is not one of the families checked with them ({', '.join(FAMILIES)})"
    if dtype not in DTYPES:
        return f"they compute in {' or '.join(DTYPES)}, not in {dtype}"
    return (
        not_plain(architecture, dummy=known.dummy, remote_code=known.remote_code)
        or next(_unlike_layers(architecture, known.max_context), None)
        or next(_unlike_shapes(architecture, tp), None)
        or (next(_unlike_fp6(architecture, dtype, tp), None) if quantization == FP6 else None)
    )


def device_unsupported(quantization: str | None, sm_major: int) -> str | None:
    """Returns why a CUDA device cannot run the kernels, given the first number of its compute capability."""
    if sm_major not in SM_MAJORS:
        return f"they have code for compute capability 8.0 to 9.0, the device has {sm_major}.x"
    if quantization == FP6 and sm_major != 8:  # modules/heuristics.py, instantiate_linear
        return f"{FP6} needs compute capability 8.x (A100), the device has {sm_major}.x"
    return None


def not_installed(quantization: str | None = None) -> str | None:
    """Returns what the kernels lack on this machine to be built and loaded, None when all is there."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "the package deepspeed is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        return f"DeepSpeed {version} rounds rotary frequencies to the activations' type, {_dotted(OLDEST)} does not"
    if importlib.util.find_spec("dskernels") is None:
        return "the package deepspeed-kernels is not installed"
    if quantization == FP6 and importlib.util.find_spec("qtorch") is None:
        return f"the package qtorch, with which {FP6} rounds the weights, is not installed"
    return None if built_in("inference/v2/kernels/ragged_ops", "ragged_device_ops") else no_compiler()


def built_in(folder: str, name: str) -> bool:
    """Whether an extension was compiled as DeepSpeed was installed.

    Args:
        folder: below DeepSpeed's own.
    """
    package = importlib.util.find_spec("deepspeed")
    places = list(package.submodule_search_locations or ()) if package else []
    return any(list(Path(place, folder).glob(f"{name}*.so")) for place in places)


def no_compiler() -> str | None:
    """Returns what lacks on this machine to compile DeepSpeed's extensions; None when all is there."""
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") is None and not os.access(Path(cuda, "bin/nvcc"), os.X_OK):
        return "they are compiled when first used, and there is no nvcc"
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None and (tool != "ninja" or importlib.util.find_spec("ninja") is None):
            return f"they are compiled when first used, and there is no {tool}"
    return None


def attention_atoms(token_budget: int, max_sequences: int) -> int:
    """Returns the most attention atoms of a pass, for whose buffers ``max_ragged_sequence_count`` makes room.

    ``atom_builder.cpp`` writes past their end where there are more. A sequence of ``n`` tokens takes at most
    ``1 + (n - 1) // 64``, so a pass takes at most ``max_sequences + token_budget // 64``, and never more than it has
    tokens.
    """
    return min(token_budget, max_sequences + token_budget // SMALLEST_ATOM)


def local_heads(heads: int, kv_heads: int, tp: int) -> list[tuple[int, int]] | None:
    """Returns the query and key-value heads of each rank, None where DeepSpeed cannot split them.

    As model_implementations/sharding/attn.py does: without grouped queries the ranks may differ by a head; with
    them the groups are dealt out evenly, or several ranks hold a copy of one key-value head.
    """
    if heads < tp or heads % kv_heads:
        return None
    if heads == kv_heads:
        return [(share, share) for share in shares(heads, tp)]
    if kv_heads % tp == 0:
        return [(heads // tp, kv_heads // tp)] * tp
    if kv_heads < tp and tp % kv_heads == 0:
        return [(share, 1) for share in shares(heads // kv_heads, tp // kv_heads)] * kv_heads
    return None


def shares(size: int, ranks: int, granule: int = 1) -> list[int]:
    """Returns the part of ``size`` that each rank gets, as model_implementations/sharding/utils.py splits it."""
    whole, rest = divmod(size // granule, ranks)
    return [(whole + (rank < rest)) * granule for rank in range(ranks)]


def _unlike_layers(architecture: dict[str, Any], max_context: int | None) -> Iterator[str]:
    family = architecture["model_type"]
    for rope_type in sorted(rotary_types(architecture) - set(ROPE_TYPES)):
        yield f"its rotary embedding is scaled ({rope_type}; {', '.join(ROPE_TYPES)} are possible)"
    for entry in (architecture, *rotary_settings(architecture)):
        if entry.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"only a part of each head is rotated (partial_rotary_factor {entry['partial_rotary_factor']})"
    activation = architecture.get("hidden_act", "silu")
    if activation != "silu":  # their GELU is the tanh approximation; qwen_v2 takes SiLU whatever the config says
        yield f"its hidden_act is {activation}, not silu"
    for key in ("attention_bias", "mlp_bias"):
        # No bias has a place in model_implementations/*/container.py but qwen_v2's of query, key and value.
        if architecture.get(key) and family == "llama":
            yield f"it has {key}"
    # transformers' own default for mistral; modules/implementations/attention masks causally and nothing else
    window = architecture.get("sliding_window", 4096 if family == "mistral" else None)
    if family == "qwen2" and not architecture.get("use_sliding_window"):
        window = None
    context = max_context or architecture.get("max_position_embeddings")
    if window and (context is None or context > window):
        yield f"its attention slides over {window} tokens (model.max_context={window} would do)"


def _unlike_shapes(architecture: dict[str, Any], tp: int) -> Iterator[str]:
    hidden, intermediate = architecture["hidden_size"], architecture["intermediate_size"]
    vocabulary = architecture["vocab_size"]
    heads, kv_heads, head_dim = attention_heads(architecture)
    if heads * head_dim != hidden:  # model_implementations/sharding/qkv.py, qkv_out_features
        yield f"{heads} heads of {head_dim} are not its hidden_size {hidden}"
    if head_dim not in HEAD_DIMS:
        yield f"its head size is {head_dim}, not one of {_listed(HEAD_DIMS)}"
    if hidden > HIDDEN_MOST:
        yield f"its hidden_size {hidden} is above {HIDDEN_MOST}"
    if HIDDEN_PARTIAL_WARP[0] < hidden <= HIDDEN_PARTIAL_WARP[1]:
        yield f"their norm adds up wrongly at hidden_size {hidden}"
    split = local_heads(heads, kv_heads, tp)
    if split is None:
        yield f"{heads} query and {kv_heads} key-value heads cannot be split over {tp} ranks"
    for local, local_kv in split or []:
        if local // local_kv not in QUERY_RATIOS:
            yield (
                f"{local} query to {local_kv} key-value heads{_a_rank(tp)} is a ratio of {local // local_kv}, "
                f"not one of {_listed(QUERY_RATIOS)}"
            )
    if intermediate % INTERMEDIATE_GRANULE or intermediate // INTERMEDIATE_GRANULE < tp:
        yield f"its intermediate_size {intermediate} cannot be split over {tp} ranks in steps of {INTERMEDIATE_GRANULE}"
    if max(shares(intermediate, tp, INTERMEDIATE_GRANULE)) > INTERMEDIATE_MOST:
        yield f"its intermediate_size {intermediate} is above {INTERMEDIATE_MOST}{_a_rank(tp)}"
    if vocabulary % (tp * VOCABULARY_GRANULE):
        yield f"its vocab_size {vocabulary} is not a multiple of {VOCABULARY_GRANULE}{_a_rank(tp)}"


def _unlike_fp6(architecture: dict[str, Any], dtype: str, tp: int) -> Iterator[str]:
    if dtype != "float16":  # modules/implementations/linear/quantized_linear.py
        yield f"{FP6} computes with float16 activations, not {dtype}"
    hidden, intermediate = architecture["hidden_size"], architecture["intermediate_size"]
    heads, kv_heads, head_dim = attention_heads(architecture)
    split = local_heads(heads, kv_heads, tp) or []
    inner = shares(intermediate, tp, INTERMEDIATE_GRANULE)
    for (local, local_kv), width in zip(split, inner, strict=True):
        for name, out_features, in_features in (
            ("query-key-value", (local + 2 * local_kv) * head_dim, hidden),
            ("attention output", hidden, local * head_dim),
            ("gate-up", 2 * width, hidden),
            ("down", hidden, width),
        ):
            if out_features % FP6_OUT_GRANULE or in_features % FP6_IN_GRANULE:
                yield (
                    f"{FP6} needs weights in multiples of {FP6_OUT_GRANULE} x {FP6_IN_GRANULE}, the {name} "
                    f"weight is {out_features} x {in_features}{_a_rank(tp)}"
                )


def _a_rank(tp: int) -> str:
    return " a rank" if tp > 1 else ""


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
