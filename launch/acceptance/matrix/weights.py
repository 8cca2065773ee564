"""A checkpoint of real width with random weights, written on the spot: an ordinary one, which every engine reads.

Nothing of a 7B or 13B model has to be carried to the machine. The numbers are those of ``model.weights=dummy``
(:mod:`harness.models.made_up`), so a run that makes them up itself computes the same model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from harness.basics.errors import UserError, report
from harness.basics.files import replace as replace_file
from harness.basics.places import CONF
from harness.models import made_up
from harness.models.architecture import required_bytes
from harness.models.source import Source
from harness.models.tensors import skeleton

SHARD_BYTES = 1 << 30
WRITERS = 4  # shards on their way to the disk at a time
SPARE_BYTES = 2 << 30  # of the disk, beside the checkpoint
WRITTEN = "written.json"  # comes last: without it the directory is what an interrupted attempt has left
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Written:
    """A checkpoint as it was written.

    Attributes:
        architecture: the keys of its ``config.json`` that were asked for.
        size: bytes of its weights.
        seconds: that drawing and writing took.
    """

    architecture: dict[str, Any]
    dtype: str
    size: int
    shards: int
    seconds: float


def architecture(option: str, **changed: Any) -> dict[str, Any]:
    """Returns the ``model.architecture`` of an option of ``conf/model``, with some keys changed."""
    found = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())["architecture"]
    return {**found, **changed}


def write(directory: Path, sizes: dict[str, Any], dtype: str, device: str, tokenizer: Path) -> Written:
    """Writes a checkpoint, or finds it written already.

    Args:
        directory: of the checkpoint; what lies there is replaced, unless it is this very checkpoint.
        sizes: keys of its ``config.json``.
        dtype: torch type of the weights.
        device: where they are drawn, ``cpu`` or ``cuda``; they are the same numbers.
        tokenizer: a directory with the tokenizer's files.

    Raises:
        UserError: the disk has no room for it.
    """
    found = written(directory)
    if found is not None and (found.architecture, found.dtype) == (sizes, dtype):
        return found
    started = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if (lack := lacking(directory, sizes, dtype)) is not None:
        raise UserError("HARNESS_CACHE", lack, "set it to a directory with more room, or take model.weights=dummy")
    model: Any = skeleton(Source("dummy", None, None, None, {**sizes, "dtype": dtype}, False))
    model.config.architectures = [type(model).__name__]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    size, weight_map = _write_shards(directory, shapes, getattr(torch, dtype), device)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    replace_file(directory / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, directory)
    done = Written(sizes, dtype, size, len(set(weight_map.values())), round(time.monotonic() - started, 2))
    replace_file(directory / WRITTEN, json.dumps(asdict(done)).encode())
    return done


def written(directory: Path) -> Written | None:
    """Returns what was written there; None where that is not whole."""
    try:
        return Written(**json.loads((directory / WRITTEN).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def lacking(directory: Path, sizes: dict[str, Any], dtype: str) -> str | None:
    """Returns that a disk has no room for a checkpoint in ``directory``, which is there; None where it has."""
    kind: torch.dtype = getattr(torch, dtype)
    needed, free = required_bytes(sizes, kind.itemsize) or 0, shutil.disk_usage(directory).free
    if free >= needed + SPARE_BYTES:
        return None
    return f"{directory} has {free / 2**30:.1f} GiB left, the checkpoint takes {needed / 2**30:.1f} GiB"


def _write_shards(
    directory: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> tuple[int, dict[str, str]]:
    """Draws and writes all weights; returns their bytes and which file each is in."""
    groups = list(_groups(shapes, dtype.itemsize))
    weight_map: dict[str, str] = {}
    size = 0
    with ThreadPoolExecutor(WRITERS) as writers:
        under_way: set[Future[None]] = set()
        for number, names in enumerate(groups, start=1):
            if len(under_way) == WRITERS:  # the host holds no more than these
                ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for one in ended:
                    one.result()  # raises what went wrong
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            tensors = {name: _drawn(name, shapes[name], dtype, device) for name in names}
            size += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(names, file)
            under_way.add(writers.submit(save_file, tensors, os.fspath(directory / file), {"format": "pt"}))
        for one in under_way:
            one.result()
    return size, weight_map


def _groups(shapes: dict[str, tuple[int, ...]], element_bytes: int) -> Iterator[list[str]]:
    """Yields the names of each shard's weights, in order."""
    group: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = element_bytes * torch.Size(shape).numel()
        if group and held + size > SHARD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


@torch.inference_mode()
def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    made_up.draw(name, tensor, shape)
    return tensor.cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a checkpoint in a process of its own, so that nobody else holds a context of the GPU meanwhile.

    ``python -m acceptance.matrix.weights DIRECTORY ARCHITECTURE DTYPE DEVICE TOKENIZER``: as :func:`write` takes them,
    the architecture as JSON. Prints what was written as JSON; 2 is the exit status where there is no room.
    """
    directory, sizes, dtype, device, tokenizer = sys.argv[1:] if arguments is None else arguments
    try:
        done = write(Path(directory), json.loads(sizes), dtype, device, Path(tokenizer))
    except UserError as error:
        return report(error)
    print(json.dumps(asdict(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
