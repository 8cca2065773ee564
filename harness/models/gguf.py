"""Architecture and tokenizer of a GGUF file, from its header."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError
from harness.models.architecture import check_architecture, positive_integer
from harness.models.source import GIVE_PATH, Source

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
KEYS = {
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


def gguf_source(path: Path, trust_remote_code: bool) -> Source:
    """Returns the source of one GGUF file, its metadata as config.json's keys; checks that it is whole."""
    fields, tensors, end, size = _read(path)
    if end > size:
        raise UserError("model.path", f"{path} should have {end} bytes and has {size}", "copy it again")
    if positive_integer(fields.get("split.count")) > 1:
        raise UserError("model.path", f"{path} is one part of {fields['split.count']}", "merge the parts into one file")
    family = fields.get("general.architecture")
    architecture: dict[str, Any] = {"model_type": family}
    for key, name in KEYS.items():
        if (value := fields.get(f"{family}.{key}")) is not None:
            architecture[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    architecture.setdefault("vocab_size", next(iter(tensors.get("token_embd.weight", [])[1:]), None))
    for name in ("bos", "eos"):
        architecture[f"{name}_token_id"] = fields.get(f"tokenizer.ggml.{name}_token_id")
    architecture["tie_word_embeddings"] = "output.weight" not in tensors
    check_architecture(architecture, f"model.path, {path}, ")
    return Source("gguf", str(path.parent), path.name, str(path), architecture, trust_remote_code)


def metadata(path: Path) -> dict[str, Any]:
    """Returns what a GGUF file says of its model beside its tensors, arrays left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, list[int]], int, int]:
    """Returns metadata, shapes, and the bytes that are expected and there; raises UserError for a damaged file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("model.path", f"{path} is a file, but no GGUF file", GIVE_PATH)
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return *_header(data), len(data)
        except (struct.error, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(
                "model.path", f"{path} is cut short, or not GGUF version 2 or 3", "copy it again"
            ) from error


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, list[int]], int]:
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
            return read(SCALARS[kind])
        kind, count = read("I"), read("Q")
        if kind in SCALARS:
            position += count * struct.calcsize(f"<{SCALARS[kind]}")
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
