"""How long the Triton kernels take, and how many bytes or operations a second that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from support.attention import Layer, Shape

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.paged_attention import KvCache, build_plan, ragged_attention
from harness.engines.fastgen.runners.triton.kernels.activation import silu_and_multiply
from harness.engines.fastgen.runners.triton.kernels.attention import (
    Chunks,
    Parts,
    Tiles,
    attend,
    splits_for,
    tile_rows,
)
from harness.engines.fastgen.runners.triton.kernels.norm import add_rms_norm
from harness.engines.fastgen.runners.triton.kernels.sampling import argmax

INSIDE, TIMES, WARM = 5, 11, 2  # calls in a CUDA graph, its replays, calls before
INTERPRETED_PROCESSORS = 16


@dataclass(frozen=True)
class Timed:
    """One kind of work.

    Attributes:
        bytes_moved: read and written, where memory is what it waits for; else 0.
        flops: of its matrix products, where these are.
        in_graph: whether it is timed in a CUDA graph: else the host's part is in it.
        parts: that keys are cut into.
    """

    work: Callable[[], None]
    bytes_moved: float = 0.0
    flops: float = 0.0
    in_graph: bool = True
    parts: int = 1


@dataclass(frozen=True)
class Size:
    """Of what is timed."""

    decodes: int
    context: int
    prompt: int
    rows: int
    hidden: int
    inner: int
    vocab: int


REAL = Size(decodes=64, context=2048, prompt=4096, rows=4096, hidden=4096, inner=11008, vocab=32000)
TINY = Size(decodes=2, context=48, prompt=24, rows=3, hidden=64, inner=96, vocab=300)


def seconds_of(timed: Timed, device: str) -> float:
    """Returns the seconds of one call, the median of several: by the device's own clock where it is one."""
    for _ in range(WARM):
        timed.work()  # compiles, too
    if device == "cpu":
        began = time.perf_counter()
        timed.work()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    again, count = timed.work, 1
    if timed.in_graph:
        graph, count = torch.cuda.CUDAGraph(), INSIDE
        with torch.cuda.graph(graph):
            for _ in range(INSIDE):
                timed.work()
        again = graph.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(TIMES)]
    for begin, end in events:
        begin.record()
        again()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000 / count


def all_of(size: Size, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Timed]]:
    """Returns, by name, what makes each thing that is timed."""
    cuda = device == "cuda"
    seven, llama3, seventy = (
        Shape(128, group, kv_heads if cuda else 1, 64, dtype, device)
        for group, kv_heads in ((1, 32), (4, 8), (8, 1))  # of 70B a rank's of eight
    )
    count, context, more = size.decodes, size.context, 8 if cuda else 1
    sized: dict[str, Callable[[], Timed]] = {
        f"decode attention, 7B, {count} of {context}": partial(decodes, seven, count, context),
        f"decode attention, Llama-3 8B, {2 * count} of {context}": partial(decodes, llama3, 2 * count, context),
        f"decode attention, 70B over 8 ranks, {more * count} of {context}": partial(
            decodes, seventy, more * count, context
        ),
        f"decode attention, 7B, 4 of {2 * context}": partial(decodes, seven, 4, 2 * context),
        f"decode attention of PyTorch, 7B, {count} of {context}": partial(torch_decodes, seven, count, context),
        f"prompt attention, 7B, {size.prompt} tokens": partial(prompt, seven, size.prompt),
    }
    rows = (size.rows, dtype, device)
    between: dict[str, Callable[[], Timed]] = {
        f"residual and norm, {size.rows} x {size.hidden}": partial(norm, size.hidden, *rows),
        f"silu times up, {size.rows} x {size.inner}": partial(silu, size.inner, *rows),
        f"argmax, {size.rows} x {size.vocab}": partial(best, size.vocab, *rows),
    }
    return sized | between


def decodes(shape: Shape, count: int, context: int) -> Timed:
    """Returns attention of so many decodes that each see ``context`` keys."""
    numbers = torch.arange(count, dtype=torch.int32, device=shape.device)
    blocks, keys, values = _cache(shape, count, context)
    last = torch.full_like(numbers, context - 1)
    chunks = Chunks(numbers, last, torch.ones_like(numbers), numbers, blocks.int())
    processors = _processors(shape.device)
    splits = splits_for(count, shape.kv_heads, context, processors)
    tiles = Tiles(numbers, torch.zeros_like(numbers), tile_rows(shape.group, decode=True), splits)
    room = Parts.of(shape.group, shape.head_dim, processors, torch.device(shape.device))
    qkv, out = _queries(shape, count)

    def work() -> None:
        attend(qkv, keys, values, out, chunks, tiles, shape.head_dim**-0.5, room)

    return Timed(work, _read(shape, count * context), parts=splits)


def torch_decodes(shape: Shape, count: int, context: int) -> Timed:
    """Returns the torch runner's attention of the same."""
    blocks, keys, values = _cache(shape, count, context)
    chunks = [
        (Sequence(uid, [0] * context, context, 1, blocks=own), context - 1, 1, True)
        for uid, own in enumerate(blocks.tolist())
    ]
    plan = build_plan(RaggedBatch(chunks, count, 0), [KvCache(keys, values)], torch.device(shape.device))
    qkv, _ = _queries(shape, count)
    heads = qkv.view(count, -1, shape.head_dim).transpose(0, 1)[None]
    query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)

    def work() -> None:
        ragged_attention(Layer(), query, key, value, None, ragged=plan)

    return Timed(work, _read(shape, count * context), in_graph=False)


def prompt(shape: Shape, tokens: int) -> Timed:
    """Returns attention of one prompt that begins its sequence."""
    blocks, keys, values = _cache(shape, 1, tokens)
    whole: dict[str, Any] = {"dtype": torch.int32, "device": shape.device}
    zero, length = torch.zeros(1, **whole), torch.full((1,), tokens, **whole)
    rows = tile_rows(shape.group, decode=False)
    first = torch.arange(0, tokens, rows // shape.group, **whole)
    tiles = Tiles(torch.zeros_like(first), first, rows)
    chunks = Chunks(zero, zero, length, zero, blocks.int())
    qkv, out = _queries(shape, tokens)

    def work() -> None:
        attend(qkv, keys, values, out, chunks, tiles, shape.head_dim**-0.5)

    pairs = tokens * (tokens + 1) // 2
    return Timed(work, flops=4.0 * pairs * shape.heads * shape.head_dim)


def norm(columns: int, rows: int, dtype: torch.dtype, device: str) -> Timed:
    """Returns residual sum and norm: two arrays read, two written."""
    residual, added, out = (torch.randn(rows, columns, dtype=dtype, device=device) for _ in "rao")
    weight = torch.zeros(columns, dtype=dtype, device=device)
    added.mul_(1e-3)  # lest the residual overflow
    moved = 4.0 * rows * columns * dtype.itemsize
    return Timed(lambda: add_rms_norm(added, residual, weight, 1e-5, out), moved)


def silu(columns: int, rows: int, dtype: torch.dtype, device: str) -> Timed:
    """Returns SiLU times up: two arrays read, one written."""
    gate_up = torch.randn(rows, 2 * columns, dtype=dtype, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return Timed(lambda: silu_and_multiply(gate_up, out), 3.0 * rows * columns * dtype.itemsize)


def best(columns: int, rows: int, dtype: torch.dtype, device: str) -> Timed:
    """Returns the best of each row of logits."""
    logits = torch.randn(rows, columns, dtype=dtype, device=device)
    ids, values = torch.empty(rows, dtype=torch.int32, device=device), torch.empty(rows, device=device)
    return Timed(lambda: argmax(logits, ids, values), 1.0 * rows * columns * dtype.itemsize)


def _cache(shape: Shape, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns scattered blocks of each sequence, ``[sequences, blocks of one]``, and keys and values."""
    each = -(-context // shape.block_size)
    blocks = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(0)).to(shape.device)
    size = (sequences * each, shape.kv_heads, shape.block_size, shape.head_dim)
    keys, values = (torch.randn(size, dtype=shape.dtype, device=shape.device) for _ in "kv")
    return blocks.view(sequences, each), keys, values


def _queries(shape: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = shape.heads * shape.head_dim
    columns = width + 2 * shape.kv_heads * shape.head_dim
    qkv = torch.randn(tokens, columns, dtype=shape.dtype, device=shape.device)
    return qkv, torch.empty(tokens, width, dtype=shape.dtype, device=shape.device)


def _read(shape: Shape, keys: int) -> float:
    """Returns the bytes of so many keys and their values."""
    return 2.0 * keys * shape.kv_heads * shape.head_dim * shape.dtype.itemsize


def _processors(device: str) -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else INTERPRETED_PROCESSORS
