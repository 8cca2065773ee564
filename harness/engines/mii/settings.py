"""What ``engine=mii`` tells DeepSpeed-MII, and the checkpoint as MII is to see it; none of it imports MII."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.basics.errors import UserError, one_line
from harness.config.checks import parse_bytes
from harness.engines.base import EngineSettings
from harness.engines.known_model import KnownModel
from harness.engines.shared.kv_memory import is_fraction, too_little, too_much
from harness.engines.shared.ragged_kernels import attention_atoms
from harness.models.architecture import LLAMA_LIKE, attention_heads, kv_bytes_per_token
from harness.models.directory import find, weight_files
from harness.models.generation import stop_ids
from harness.models.source import Source
from harness.models.transformers_quiet import as_user_error

RESERVED_BYTES = 1_000_000_000  # what MII by default leaves free beside the KV cache
USE_FASTGEN = "use engine=fastgen"
NORM_EPSILON = 1e-5  # deepspeed/inference/v2/modules/configs/norm_config.py; make_norm_layer leaves it there


def model_settings(
    settings: EngineSettings, path: str, tokenizer: object, memory: dict[str, Any], zmq_port: int, dist_port: int
) -> dict[str, Any]:
    """Returns this run's settings as the arguments of ``mii.config.ModelConfig``.

    Args:
        path: the checkpoint's directory.
        tokenizer: a ``MIITokenizerWrapper``; without one MII loads its own, with remote code allowed.
        memory: DeepSpeed's ``MemoryConfig``, from :func:`memory_settings`.
        zmq_port: where the leader's batches reach the other ranks; MII's default is the same for all jobs.
        dist_port: of the process group that MII makes where there is none; likewise.
    """
    engine = settings.engine
    manager: dict[str, Any] = {
        "max_ragged_batch_size": engine.token_budget,
        # Room for attention atoms; RequestPipeline keeps passes to max_sequences.
        "max_ragged_sequence_count": attention_atoms(engine.token_budget, engine.max_sequences),
        # Finished sequences stay tracked until the next pass.
        "max_tracked_sequences": max(2048, 2 * engine.max_sequences),
        "memory_config": memory,
    }
    if settings.max_context is not None:
        manager["max_context"] = settings.max_context
    return {
        "model_name_or_path": path,
        "tokenizer": tokenizer,
        # Never left out: the default is the environment's WORLD_SIZE.
        "tensor_parallel": settings.tp,
        "quantization_mode": engine.quantization,
        "inference_engine_config": {"state_manager": manager},
        "max_length": settings.max_context,
        "zmq_port_number": zmq_port,
        "torch_dist_port": dist_port,
    }


def memory_settings(
    kv_memory: float | int | str, free: int, weights: int, block_bytes: int, tokens_per_block: int
) -> dict[str, Any]:
    """Returns ``engine.kv_memory`` as the arguments of DeepSpeed's ``MemoryConfig``.

    A fraction becomes the bytes to keep free (mode ``reserve``, DeepSpeed counts the blocks once the weights
    are there), a number of bytes becomes a number of blocks (mode ``allocate``).

    Args:
        kv_memory: a fraction of what the weights leave free, bytes, or a size such as 2GiB; of one device.
        free, weights: bytes of one device, before loading, and those that the weights will take of them.
        block_bytes, tokens_per_block: size of one block of the KV cache on one device.

    Raises:
        UserError: the weights do not fit, or the memory is less than a block or more than there is.
    """
    left = free - weights
    if left < block_bytes:
        raise UserError(
            "model",
            f"its weights need {weights / 2**30:.1f} GiB a device, {free / 2**30:.1f} GiB are free",
            "use a larger parallel.tp, or a smaller model",
        )
    amount = parse_bytes(kv_memory)
    if is_fraction(kv_memory):
        return {"mode": "reserve", "size": max(RESERVED_BYTES, int((1 - amount) * left))}
    if amount < block_bytes:
        raise too_little(kv_memory, int(amount), tokens_per_block, block_bytes)
    if amount > left:
        raise too_much(kv_memory, amount, left, " beside the weights")
    return {"mode": "allocate", "size": int(amount // block_bytes)}


def generation_settings(prompt_tokens: int, output_len: int, stops: frozenset[int]) -> dict[str, Any]:
    """Returns the arguments of MII's ``GenerateParamsConfig`` for one greedy request.

    MII compares ``max_length`` and ``min_new_tokens`` with lengths that include the prompt, so the one is set
    where it never cuts and the other never takes part. ``stop`` takes texts of single tokens; with
    :class:`harness.engines.mii.pipeline.TokenIds` they are the ids themselves. So all of the checkpoint's
    end-of-sequence ids count; MII's own rule knows one.
    """
    return {
        "max_new_tokens": output_len,
        "max_length": prompt_tokens + output_len,
        "min_new_tokens": 0,
        "ignore_eos": not stops,
        "stop": [str(token) for token in sorted(stops)],
        "do_sample": False,
        "top_p": 1.0,
        "top_k": None,
        "temperature": None,
        "stream": False,
        "return_full_text": False,
    }


def local_checkpoint(settings: EngineSettings) -> Source:
    """Returns the checkpoint as a local directory, a hub id's downloaded first; raises UserError where none is."""
    source = settings.source
    if source.kind in ("dummy", "gguf"):
        what = "model.weights=dummy" if source.kind == "dummy" else f"the GGUF file {source.gguf_file}"
        remedy = "give model.path=DIR with config.json and *.safetensors, or use engine=fastgen"
        raise UserError("engine", f"mii reads a checkpoint's safetensors, not {what}", remedy)
    if source.pickled:
        raise UserError(
            "model.allow_pickle", "true: mii reads safetensors alone", "use engine=fastgen, or convert them"
        )
    if source.kind == "directory":
        return source
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(str(source.path), allow_patterns=["*.safetensors", "*.json"])
    except (OSError, ValueError, RuntimeError) as error:
        found = f"{source.path}: {one_line(str(error), 300)}"
        raise UserError("model.path", found, "give a local directory") from error
    return find(directory, source.trust_remote_code, need_weights=True)


def stored_weights(source: Source) -> dict[str, tuple[int, str]]:
    """Returns, by name, how many elements each weight has and how they are stored (``F16``, ``BF16``, ...)."""
    from safetensors import safe_open

    weights = {}
    for path in weight_files(Path(str(source.path))):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                weights[name] = (math.prod(part.get_shape()), part.get_dtype())
    return weights


def refuse_unsupported(settings: EngineSettings, source: Source, capability: tuple[int, int] | None = None) -> None:
    """Raises UserError for a model or a launch that would end in one of MII's tracebacks.

    Args:
        capability: the CUDA device's compute capability; None asks torch, which takes the device.
    """
    from harness.engines.shared.ragged_kernels import device_unsupported, not_installed, unsupported

    tp, quantization = settings.tp, settings.engine.quantization
    if tp > settings.host_ranks:
        found = f"{tp} ranks, {settings.host_ranks} of them on this host: MII's tensor parallelism stays on one"
        raise UserError("parallel.tp", found, USE_FASTGEN)
    known = KnownModel(source.architecture, settings.dtype, tp, settings.max_context)
    reason = unsupported(known, quantization)
    if source.kind == "directory":  # a plan has no files to look into
        reason = reason or next(_beyond_mii(source, quantization), None)
    if reason is None and settings.device.startswith("cuda"):
        reason = not_installed(quantization) or device_unsupported(
            quantization, (capability or _capability(settings))[0]
        )
    if reason is not None:
        raise UserError("engine", f"mii cannot run {source.path or 'this model'}: {reason}", USE_FASTGEN)


def _capability(settings: EngineSettings) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(settings.device)


def _beyond_mii(source: Source, quantization: str | None) -> Iterator[str]:
    """Yields what DeepSpeed's kernels could compute, but MII's way of loading a model does not."""
    config = _config(source)
    epsilon = getattr(config, "rms_norm_eps", NORM_EPSILON)
    if epsilon != NORM_EPSILON:
        yield f"its rms_norm_eps is {epsilon}, and MII computes with {NORM_EPSILON} whatever the model says"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        yield f"its rotary embedding is scaled ({rope['rope_type']})"
    weights = stored_weights(source)
    if config.model_type in LLAMA_LIKE and config.model_type != "qwen2" and "lm_head.weight" not in weights:
        yield "its output projection is tied to the embeddings, and MII looks for lm_head.weight"
    stored = {kind for _, kind in weights.values()} - {"F16"}
    if quantization and stored:
        yield f"{quantization} quantizes float16 weights, and some are stored as {min(stored)}"
    if quantization and importlib.util.find_spec("qtorch") is None:
        yield f"{quantization} needs the package qtorch, which is not installed"


def _config(source: Source) -> Any:
    """Returns transformers' config of a checkpoint, none of whose code is run; raises UserError if it has to be."""
    from transformers import AutoConfig

    with as_user_error("model.path", str(source.path)):
        return AutoConfig.from_pretrained(source.path, trust_remote_code=False)


def end_of_sequence(source: Source, settings: EngineSettings) -> frozenset[int]:
    """Returns the checkpoint's end-of-sequence ids as transformers would, none under ``stop: length``."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(source.path)
    except OSError:
        generation = None  # no generation_config.json
    model: Any = SimpleNamespace(generation_config=generation, config=_config(source))
    return stop_ids(model, settings.generation)


def lay_out(source: Source, dtype: str, place: Path) -> None:
    """Makes ``place`` the checkpoint as MII is to see it: links to the weights, and a config with our ``dtype``.

    MII computes in the type that config.json names, follows ``auto_map`` to remote code, and unpickles a
    ``ds_model_config.pkl`` beside it.
    """
    directory = Path(str(source.path))
    architecture = {key: value for key, value in source.architecture.items() if key not in ("auto_map", "torch_dtype")}
    (place / "config.json").write_text(json.dumps({**architecture, "dtype": dtype}))
    files = weight_files(directory)
    if files != [directory / "model.safetensors"]:
        files = [directory / "model.safetensors.index.json", *files]
    for path in files:
        (place / path.name).symlink_to(path)


def device_memory(settings: EngineSettings, source: Source) -> dict[str, Any]:
    """Returns :func:`memory_settings` for this rank's device and share of the model."""
    import torch
    from deepspeed.inference.v2.kernels.ragged_ops.blocked_flash.blocked_flash import get_kv_block_size

    tp = settings.tp
    _, kv_heads, head_dim = attention_heads(source.architecture)
    block = get_kv_block_size(head_dim)
    block_bytes = block * kv_bytes_per_token(source.architecture, 2) // kv_heads * -(-kv_heads // tp)
    # FP6 or half precision: MII has no other.
    element = 0.75 if settings.engine.quantization else 2
    weights = int(sum(count for count, _ in stored_weights(source).values()) * element / tp)
    free = torch.cuda.mem_get_info(settings.device)[0]
    return memory_settings(settings.engine.kv_memory, free, weights, block_bytes, block)
