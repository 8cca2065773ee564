"""Checkpoints: finding one by its path, and checking from headers alone that a directory's can be whole.

Imports neither torch nor transformers; a checkpoint of gigabytes is checked in milliseconds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.models.architecture import check_architecture
from harness.models.gguf import gguf_source
from harness.models.hub import cached_config, is_hub_id
from harness.models.source import GIVE_PATH, Source

PICKLE = "pytorch_model.bin"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
TORCH_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


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
            return gguf_source(place.absolute(), trust_remote_code)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user in ~user
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("model.path", f"{getattr(error, 'filename', None) or path}: {reason}", GIVE_PATH) from error
    if not is_hub_id(path):
        raise UserError("model.path", f"no such directory or GGUF file: {quoted(path, 200)}", GIVE_PATH)
    cached = cached_config(path)
    architecture = {} if cached is None else _read_json(cached)
    refuse_kernels(architecture, f"model.path, {path}, ", trust_remote_code)
    return Source("hub", path, None, path, architecture, trust_remote_code, allow_pickle)


def _directory(directory: Path, trust_remote_code: bool, need_weights: bool, allow_pickle: bool) -> Source:
    config = directory / "config.json"
    shards = weight_files(directory) if need_weights else []
    pickles = weight_files(directory, PICKLE) if need_weights and allow_pickle and not shards else []
    if not shards and not pickles and (need_weights or not config.is_file()):
        ggufs = sorted(directory.glob("*.gguf"))
        if len(ggufs) == 1:
            return gguf_source(ggufs[0], trust_remote_code)
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
    """Returns ``model.tokenizer`` as `tokenizer.load_tokenizer` takes it.

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
    if is_hub_id(path):
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


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise UserError("model.path", f"{path} is missing, though the index names it", "copy the file")


def copied_from(source: Source, dtype: str) -> str | None:
    """Returns what the weights are, where loading them in ``dtype`` certainly copies them all; None where it may not.

    A type as torch calls it, or a word: transformers maps safetensors that have the asked type, and converts others,
    unpacks a GGUF and draws dummy weights in memory. (227 MiB of weights took 31 MiB mapped, 258 converted.)
    """
    if source.kind in ("dummy", "gguf"):
        return source.kind
    if source.kind != "directory" or source.pickled:
        return None
    types = stored_types(Path(str(source.path)))
    return None if dtype in types else min(types, default=None)


def stored_types(directory: Path) -> set[str]:
    """Returns the types of a checkpoint's tensors, as torch calls them, or as safetensors does where that has no match.

    Raises:
        UserError: a file is damaged.
    """
    found = {entry["dtype"] for path in weight_files(directory) for entry in _check_safetensors(path).values()}
    return {TORCH_TYPES.get(name, name) for name in found}


def _check_safetensors(path: Path) -> dict[str, Any]:
    """Returns the header's entries; the tensors must fill the file to its last byte."""
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
    return dict(header)
