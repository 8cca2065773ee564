"""Tells one checkpoint from another without reading all of it: a hash of config, sizes, headers and samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from harness.basics.errors import UserError
from harness.models.directory import PICKLE, weight_files
from harness.models.source import Source

HEAD_BYTES = 1 << 20  # read whole: a small file, or the header that names and places the tensors
SAMPLES, SAMPLE_BYTES = 64, 4096  # of what follows, evenly spaced, the end among them


def fingerprint(source: Source) -> str | None:
    """Returns a SHA-256 in hex of what ``source`` names; None for a hub id, whose files have no certain place.

    It covers the config, and of each file of weights its name, its size, its first MiB and 64 samples of 4 KiB: a
    70B checkpoint takes milliseconds. Two checkpoints of other training differ in every sample; a few bytes changed
    on purpose may not show.

    Raises:
        UserError: a file cannot be read.
    """
    if source.kind == "hub":
        return None
    digest = hashlib.sha256(json.dumps([source.kind, source.architecture], sort_keys=True, default=str).encode())
    for path in [] if source.path is None or source.kind == "dummy" else _files(source):
        try:
            _add(digest, path)
        except OSError as error:
            raise UserError("model.path", f"{path}: {error.strerror}", "check this path") from error
    return digest.hexdigest()


def _files(source: Source) -> list[Path]:
    directory = Path(str(source.path))
    if source.gguf_file is not None:
        return [directory / source.gguf_file]
    return weight_files(directory) or weight_files(directory, PICKLE)


def _add(digest: hashlib._Hash, path: Path) -> None:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        digest.update(f"\0{path.name}\0{size}\0".encode())
        file.seek(0)
        digest.update(file.read(HEAD_BYTES))
        rest = size - HEAD_BYTES - SAMPLE_BYTES
        for number in range(1, SAMPLES + 1) if rest > 0 else ():
            file.seek(HEAD_BYTES + rest * number // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
