"""Checkpoints on disk: finding one, and checking from headers alone that it can be whole.

Imports neither torch nor transformers; a checkpoint of gigabytes is checked in milliseconds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from harness.errors import UserError, quoted

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
ESSENTIAL = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
PICKLE = "pytorch_model.bin"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
GIVE_PATH = "give the directory of a checkpoint (config.json and *.safetensors) or a GGUF file"


@dataclass(frozen=True, slots=True)
class Source:
    """What `checkpoint.locate` found: enough to plan with, and to load from."""

    kind: str  # "directory", "gguf", "hub" or "dummy"
    path: str | None  # the directory, the GGUF file's directory, or the hub id
    gguf_file: str | None  # the file's name in `path`
    tokenizer: str | None  # directory, GGUF file or hub id; None is the byte tokenizer
    architecture: dict[str, Any]  # config.json's keys; {} for a hub id that is not in the local cache
    trust_remote_code: bool
    pickled: bool = False  # the weights are pickles (of a hub id: may be), and model.allow_pickle lets them be read


def find(path: str, trust_remote_code: bool, need_weights: bool, allow_pickle: bool = False) -> Source:
    """Returns the source that ``model.path`` names; ``need_weights`` is off for dummy weights.

    Raises:
        UserError: nothing is there, a file is broken or missing, or there are only pickled weights, not allowed.
    """
    try:
        place = Path(path).expanduser()
        if path and place.is_dir():
            return _directory(place.absolute(), trust_remote_code, need_weights, allow_pickle)
        if place.is_file():
            return _gguf(place.absolute(), trust_remote_code)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user in ~user
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("model.path", f"{getattr(error, 'filename', None) or path}: {reason}", GIVE_PATH) from error
    if not _is_hub_id(path):
        raise UserError("model.path", f"no such directory or GGUF file: {quoted(path, 200)}", GIVE_PATH)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    if not isinstance(cached, str) and not _hub_reachable():
        raise UserError("model.path", f"{path} is not in the local cache, and its hub cannot be reached", GIVE_PATH)
    architecture = _read_json(Path(cached)) if isinstance(cached, str) else {}
    refuse_kernels(architecture, f"model.path, {path}, ", trust_remote_code)
    return Source("hub", path, None, path, architecture, trust_remote_code, allow_pickle)


def _hub_reachable() -> bool:
    """Returns whether the hub's name can be looked up; without this its client retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy looks it up
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.gguf)", path) is not None


def _directory(directory: Path, trust_remote_code: bool, need_weights: bool, allow_pickle: bool) -> Source:
    config = directory / "config.json"
    shards = weight_files(directory) if need_weights else []
    pickles = weight_files(directory, PICKLE) if need_weights and allow_pickle and not shards else []
    if not shards and not pickles and (need_weights or not config.is_file()):
        ggufs = sorted(directory.glob("*.gguf"))
        if len(ggufs) == 1:
            return _gguf(ggufs[0], trust_remote_code)
        raise _nothing_to_load(directory, ggufs, need_weights)
    if not config.is_file():
        raise UserError("model.path", f"{directory} has no config.json", "copy it from where the weights came from")
    if (adapter := directory / "adapter_config.json").is_file():
        # With peft installed, transformers would load the model that this file names; without it, ignore the adapter.
        found = f"{adapter} makes it an adapter of another model"
        raise UserError("model.path", found, "merge it into its base model, or take that file away")
    if need_weights and (parts := sorted(directory.glob("shard-[0-9]*-model-*"))):
        found = f"{parts[0]} is one of the parts that transformers would read in place of model.safetensors"
        raise UserError("model.path", found, "take those files away")
    architecture = _read_json(config)
    check_architecture(architecture, f"model.path, {config}, ")
    refuse_kernels(architecture, f"model.path, {config}, ", trust_remote_code)
    for shard in shards:
        _check_safetensors(shard)
    for pickle in pickles:
        _check_there(pickle)
    has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = str(directory) if has_tokenizer else None
    return Source("directory", str(directory), None, tokenizer, architecture, trust_remote_code, bool(pickles))


def weight_files(directory: Path, name: str = "model.safetensors") -> list[Path]:
    """Returns the files that hold a checkpoint's weights, as transformers chooses them; none where there are none.

    Args:
        name: of a single file; that of several ends with ``.index.json`` and names them.

    Raises:
        UserError: the index is broken, or names a file outside ``directory``.
    """
    single, index = directory / name, directory / f"{name}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError("model.path", f"{index} has no weight_map", "copy the file again")
    for file in names.values():
        if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file or "\\" in file:
            found = f"{index} names {quoted(file)}, which is no file of that directory"
            raise UserError("model.path", found, "use a checkpoint from a source that you trust")
    return [directory / file for file in sorted(set(names.values()))]


def _nothing_to_load(directory: Path, ggufs: list[Path], need_weights: bool) -> UserError:
    if ggufs:
        remedy = f"give one of them, e.g. model.path={ggufs[0]}"
        return UserError("model.path", f"{directory} holds {len(ggufs)} GGUF files", remedy)
    if not need_weights:
        return UserError("model.path", f"{directory} has no config.json", "give the directory that has it")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        return UserError(
            "model.path",
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code when they are loaded",
            f"convert them to safetensors (transformers' save_pretrained does), or give model.allow_pickle=true "
            f"to read the tensors alone out of {PICKLE}",
        )
    return UserError("model.path", f"{directory} holds neither model.safetensors nor a GGUF file", GIVE_PATH)


def find_tokenizer(path: str) -> str:
    """Returns ``model.tokenizer`` as `checkpoint.load_tokenizer` takes it.

    Raises:
        UserError: it is neither a directory with a tokenizer, nor a GGUF file, nor a hub id.
    """
    place = Path(os.path.expanduser(path))
    try:
        if path and place.is_dir():
            if any((place / name).is_file() for name in TOKENIZER_FILES):
                return str(place.absolute())
            raise UserError("model.tokenizer", f"no tokenizer files in {place}", "give a directory with tokenizer.json")
        if place.suffix == ".gguf" and place.is_file():
            return str(place.absolute())
    except OSError as error:
        raise UserError("model.tokenizer", f"{place}: {error.strerror}", "give a readable directory") from error
    if _is_hub_id(path):
        return path
    found = f"no such directory: {quoted(path, 200)}"
    raise UserError("model.tokenizer", found, "give a directory with tokenizer.json, or null for the model's own")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError("model.path", f"{path} is not JSON ({error})", "copy the file again") from error
    if not isinstance(value, dict):
        raise UserError("model.path", f"{path} is not a JSON object", "copy the file again")
    return value


def check_architecture(architecture: dict[str, Any], where: str) -> None:
    """Checks the sizes which transformers, if they were missing, would replace by its defaults.

    Raises:
        UserError: a size is missing or cannot be; ``where`` is what the message puts before the key.
    """
    family = architecture.get("model_type")
    if not isinstance(family, str) or not family:
        raise UserError(f"{where}model_type", f"is {quoted(family)}", 'give the family of models, e.g. "llama"')
    if family not in LLAMA_LIKE:
        return  # other families have other keys: transformers will tell
    for key in ESSENTIAL:
        if not positive_integer(architecture.get(key)):
            raise UserError(f"{where}{key}", f"is {quoted(architecture.get(key))}", "give a positive integer")
    for key in ("num_key_value_heads", "head_dim"):
        if architecture.get(key) is not None and not positive_integer(architecture[key]):
            found = f"is {quoted(architecture[key])}"
            raise UserError(f"{where}{key}", found, "give a positive integer or leave it out")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(architecture.get(key), dict | None):
            raise UserError(
                f"{where}{key}", f"is {quoted(architecture[key])}", "give rope_type and rope_theta, or null"
            )
    bounds = [("rms_norm_eps", architecture.get("rms_norm_eps"), 1.0)]
    bounds += [
        ("rope_theta", each.get("rope_theta"), math.inf) for each in (architecture, *rotary_settings(architecture))
    ]
    for key, value, bound in bounds:
        if value is not None and not (_is_number(value) and 0 < value < bound):
            raise UserError(f"{where}{key}", f"is {quoted(value)}", f"give a number above 0 and below {bound:g}")
    heads, kv_heads, head_dim = attention_heads(architecture)
    if heads % kv_heads:
        raise UserError(f"{where}num_key_value_heads", f"{kv_heads} does not divide the {heads} heads", "change one")
    if architecture.get("head_dim") is None and architecture["hidden_size"] % heads:
        found = f"{architecture['hidden_size']} is not a multiple of the {heads} heads"
        raise UserError(f"{where}hidden_size", found, "change one")
    if head_dim % 2:
        raise UserError(f"{where}head_dim", f"{head_dim} is odd, and rotary embeddings turn pairs", "make it even")


def refuse_kernels(value: object, where: str, trust_remote_code: bool) -> None:
    """Raises UserError for a config that names compiled kernels on a hub: transformers would fetch and run them.

    Nor may it name the files of its weights: others would be read than those that were looked at.
    """
    if isinstance(value, dict) and value.get("transformers_weights") is not None:
        found = f"{quoted(value['transformers_weights'])} names the file of the weights"
        raise UserError(f"{where}transformers_weights", found, "take it out, and name the file model.safetensors")
    if not isinstance(value, dict) or trust_remote_code:
        return
    for key, item in value.items():
        refuse_kernels(item, where, trust_remote_code)
        names = item.values() if isinstance(item, dict) else [item]
        if "_implementation" in key and any(isinstance(name, str) and "/" in name for name in names):
            remedy = "take it out, or give model.trust_remote_code=true"
            raise UserError(f"{where}{key}", f"{quoted(item)} names code to be fetched and run", remedy)


def attention_heads(architecture: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the query heads, the key-value heads and the size of one head."""
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim")
    if head_dim is None:  # transformers' default, which only qwen3 does not derive
        head_dim = 128 if architecture.get("model_type") == "qwen3" else architecture["hidden_size"] // heads
    return heads, architecture.get("num_key_value_heads") or heads, head_dim


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive_integer(value: object) -> int:
    """Returns ``value`` if it is a positive integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def not_plain(architecture: dict[str, Any], *, dummy: bool, remote_code: bool) -> str | None:
    """Returns why kernels that know a family's decoder by heart cannot take this one; None when they can.

    Args:
        dummy: the weights are made up, so how the checkpoint packs its own does not matter.
        remote_code: the checkpoint's own code may run, if it has any (``model.trust_remote_code``).
    """
    if remote_code and "auto_map" in architecture:
        return "the checkpoint brings its own code (model.trust_remote_code)"
    if not dummy and architecture.get("quantization_config"):
        return "the checkpoint's weights are packed (quantization_config)"
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not positive_integer(architecture.get(key)):
            return f"its {key} is not known"
    return None


def rotary_settings(architecture: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rotary settings, in ``rope_parameters`` since transformers 5 and in ``rope_scaling`` before."""
    for key in ("rope_parameters", "rope_scaling"):
        found = architecture.get(key)
        if isinstance(found, dict):
            yield found
            yield from (value for value in found.values() if isinstance(value, dict))  # one a kind of layer


def rotary_types(architecture: dict[str, Any]) -> set[str]:
    """Returns the kinds of rotary embedding that the config names, such as ``llama3``."""
    found = {entry.get("rope_type", entry.get("type")) for entry in rotary_settings(architecture)}
    return {str(rope_type) for rope_type in found if rope_type is not None}


def rotary_threshold(architecture: dict[str, Any]) -> int | None:
    """Returns the longest sequence that is computed with the rotary frequencies of a short one; None for any length.

    Beyond it transformers chooses other frequencies for all that share a pass (``longrope``, ``dynamic``), so that one
    sequence's length changes its neighbours' tokens, and a prompt's split its own.
    """
    limits: list[Any] = []
    for entry in rotary_settings(architecture):
        kind = entry.get("rope_type", entry.get("type"))
        if kind in ("longrope", "su"):
            found = architecture.get("original_max_position_embeddings") or entry.get(
                "original_max_position_embeddings"
            )
            limits.append(found or architecture.get("max_position_embeddings"))
        elif kind == "dynamic":
            limits.append(architecture.get("max_position_embeddings"))
    return min((limit for limit in limits if positive_integer(limit)), default=None)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise UserError("model.path", f"{path} is missing, though the index names it", "copy the file")


def _check_safetensors(path: Path) -> None:
    """Reads the header: the tensors must fill the file to its last byte."""
    _check_there(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise UserError("model.path", f"{path} is a Git LFS pointer, not the weights", "run git lfs pull there")
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise UserError("model.path", f"{path} is cut short or no safetensors file ({size} bytes)", "copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max(int(entry["data_offsets"][1]) for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError("model.path", f"{path} has a broken safetensors header", "copy it again") from error
    if end != size - 8 - length:
        found = f"{path} should have {8 + length + end} bytes and has {size}"
        raise UserError("model.path", found, "copy it again")


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


def _gguf(path: Path, trust_remote_code: bool) -> Source:
    """Returns the source of one GGUF file, its metadata as config.json's keys; checks that it is whole."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("model.path", f"{path} is a file, but no GGUF file", GIVE_PATH)
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                fields, tensors, end = _gguf_header(data)
                size = len(data)
        except (struct.error, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(
                "model.path", f"{path} is cut short, or not GGUF version 2 or 3", "copy it again"
            ) from error
    if end > size:
        raise UserError("model.path", f"{path} should have {end} bytes and has {size}", "copy it again")
    if positive_integer(fields.get("split.count")) > 1:
        raise UserError("model.path", f"{path} is one part of {fields['split.count']}", "merge the parts into one file")
    family = fields.get("general.architecture")
    architecture: dict[str, Any] = {"model_type": family}
    for key, name in _GGUF_KEYS.items():
        if (value := fields.get(f"{family}.{key}")) is not None:
            architecture[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    architecture.setdefault("vocab_size", next(iter(tensors.get("token_embd.weight", [])[1:]), None))
    for name in ("bos", "eos"):
        architecture[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{name}_token_id")
    architecture["tie_word_embeddings"] = "output.weight" not in tensors
    check_architecture(architecture, f"model.path, {path}, ")
    return Source("gguf", str(path.parent), path.name, str(path), architecture, trust_remote_code)


def _gguf_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, list[int]], int]:
    """Returns the metadata (None for arrays), the tensors' shapes (innermost first) and the bytes expected.

    The `gguf` package's reader takes seconds over the vocabulary; this one skips it.
    """
    position = 4

    def read(form: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from(f"<{form}", data, position)
        position += struct.calcsize(f"<{form}")
        return value

    def string() -> bytes:
        nonlocal position
        length = read("Q")
        position += length
        return data[position - length : position]

    def field(kind: int) -> Any:
        nonlocal position
        if kind == 8:
            return string().decode(errors="replace")
        if kind != 9:
            return read(_SCALARS[kind])
        kind, count = read("I"), read("Q")
        if kind in _SCALARS:
            position += count * struct.calcsize(f"<{_SCALARS[kind]}")
        else:
            for _ in range(count):
                field(kind)
        return None

    if read("I") not in (2, 3):
        raise ValueError("version")
    n_tensors, n_fields = read("Q"), read("Q")
    fields = {string().decode(): field(read("I")) for _ in range(n_fields)}
    shapes, ends = {}, [0]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for _ in range(n_tensors):
        name = string().decode()
        shapes[name] = [read("Q") for _ in range(min(read("I"), 8))]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(read("I"))]
        ends.append(read("Q") + math.prod(shapes[name]) // block * size)
    alignment = fields.get("general.alignment", 32)
    return fields, shapes, -(-position // alignment) * alignment + max(ends)
