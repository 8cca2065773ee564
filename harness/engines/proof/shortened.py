"""Models that do not fit beside the engine, or would take too long: a proof by their first layers alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import torch

from harness.basics.errors import UserError
from harness.engines.base import EngineSettings
from harness.engines.proof import cache
from harness.engines.shared.kv_memory import free_memory
from harness.models.architecture import first_layers, required_bytes
from harness.models.directory import weight_files
from harness.models.loading import load_model, quiet
from harness.models.source import Source

MEMORY_SHARE = 0.8  # of what is free, for Hugging Face's model
CPU_BYTES = 4 << 30  # of float32 weights: more would take a CPU longer than seconds
FIRST_LAYERS = 2


def layers_that_fit(settings: EngineSettings) -> int | None:
    """Returns of how many layers Hugging Face's model fits beside nothing else, in seconds; None for all of them."""
    source, on_cpu = settings.source, settings.device == "cpu"
    needed = required_bytes(source.architecture, 4) or _bytes_on_disk(source)
    free = MEMORY_SHARE * free_memory(settings)
    limit = min(CPU_BYTES, free) if on_cpu else free
    if needed <= limit:
        return None
    kinds = source.architecture.get("layer_types") or []
    firsts = [kinds.index(kind) for kind in set(kinds)]
    return max(FIRST_LAYERS, *(first + 1 for first in firsts), 0)


def _bytes_on_disk(source: Source) -> int:
    """Returns what the weights take in float32, taking them for 16 bits wide in their files."""
    if source.kind != "directory":
        return 0
    return 2 * sum(path.stat().st_size for path in weight_files(Path(str(source.path))))


@contextlib.contextmanager
def cut_to(settings: EngineSettings, layers: int | None, name: str) -> Iterator[Source]:
    """Yields the source, or one of its first ``layers`` alone: a checkpoint that is written for the time being."""
    source = settings.source
    if layers is None:
        yield source
        return
    architecture = source.architecture | first_layers(source.architecture, layers)
    if source.kind == "dummy":
        yield replace(source, architecture=architecture)
        return
    place = cache.root() / f"first-layers-{name}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):  # the ranks of a host share it
        if not place.is_dir():
            _write(source, settings.dtype, layers, place)
    try:
        yield replace(source, kind="directory", path=str(place), gguf_file=None, architecture=architecture)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        Path(f"{place}.lock").unlink(missing_ok=True)


def _write(source: Source, dtype: str, layers: int, place: Path) -> None:
    try:
        model = load_model(source, dtype=getattr(torch, dtype), layers=layers)
    except UserError as error:
        found = f"its first {layers} layers cannot be loaded alone, to compare the engine with ({error.found})"
        raise UserError("model", found, "use engine=baseline") from error
    with quiet():
        model.save_pretrained(f"{place}.new")
    os.replace(f"{place}.new", place)
