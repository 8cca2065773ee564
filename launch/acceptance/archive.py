"""What is carried away: one archive of tables, findings, logs, and the records of runs, without weights."""

from __future__ import annotations

import os
import tarfile
import zlib
from pathlib import Path

from acceptance import kernels

MOST = 15 * 2**20  # bytes of the archive
NEVER = (".safetensors", ".gguf", ".bin", ".pt", ".part", ".so", ".o", ".tar.gz", ".lock", ".tmp")
NOT_HERE = (kernels.FOLDER,)  # they have an archive of their own
FIRST = ("table.txt", "table.json", "runs.csv", "record.json", "config.yaml")
STEP = 2**20
HUGE = 2**29  # bytes, which would take seconds to read, and will not fit


def pack(out: Path, archive: Path, most: int = MOST) -> tuple[int, list[str]]:
    """Packs a folder of the acceptance; where it does not fit, its largest logs, traces and completions stay out.

    Returns:
        The archive's bytes, and the files left out, the largest first.
    """
    files = [
        path
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.endswith(NEVER)
        and path.relative_to(out).parts[0] not in NOT_HERE
    ]  # fmt: skip
    sizes = {path: _compressed(path) for path in files}
    taken, room = [], most
    for path in sorted(files, key=lambda one: (not _first(one, out), sizes[one])):
        if _first(path, out) or sizes[path] <= room:
            taken.append(path)
            room -= sizes[path]
    unfinished = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(unfinished, "w:gz", compresslevel=6) as packed:
        for path in sorted(taken):
            packed.add(path, str(Path(out.name, path.relative_to(out))))
    os.replace(unfinished, archive)
    left = sorted(set(files) - set(taken), key=lambda one: -sizes[one])
    return archive.stat().st_size, [str(path.relative_to(out)) for path in left]


def _first(path: Path, out: Path) -> bool:
    return path.name in FIRST or (path.parent == out and path.suffix in (".json", ".jsonl"))


def _compressed(path: Path) -> int:
    """Returns about how many bytes a file takes in the archive, with its header; of a huge one, its size."""
    if path.stat().st_size > HUGE:
        return path.stat().st_size
    size, packer = 512, zlib.compressobj(6)
    with open(path, "rb") as file:
        while block := file.read(STEP):
            size += len(packer.compress(block))
    return size + len(packer.flush())
