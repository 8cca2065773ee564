"""Causal attention of a whole ragged batch over the paged KV cache.

A program computes one tile: the query rows of one chunk's next few tokens, times the query heads that share one
key-value head, over all the keys they see or one part of them. Scores and sums are float32; no atomics, so that two
runs give the same ids. Parts of one tile are brought together by a second kernel ("flash-decoding"; Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels import OPTIONS

# The same for all head sizes and cards: what launch/compile_kernels.py shows to fit without spilling a register, with
# several programs on a processor. Where keys lie is read from the block table, so that half of the pipeline's stages go
# to the table: five are two steps of keys and values under way, three are one.
MOST_KEYS = 32  # of a step of the loop over keys; it never crosses a block of the cache
WARPS = 4
STAGES = 5
DECODE_ROWS = 16  # least rows of a tile: what a matrix instruction takes
PROMPT_ROWS = 64  # what four warps take at once on sm_90
PROGRAMS_EACH = 4  # of decode tiles on one processor: together they have enough reads under way
PART_KEYS = 128  # least keys of a part: fewer are not worth bringing together
MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a pass, all int32 ``[chunks]`` but ``table``.

    Attributes:
        begin: row of the chunk's first token in the pass.
        start: that token's position in its sequence.
        length: tokens; nothing is computed of a chunk of none.
        row: the sequence's row of ``table``.
        table: ``[rows, width]`` the cache's blocks that a sequence holds, in order.
    """

    begin: Tensor
    start: Tensor
    length: Tensor
    row: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one launch computes.

    Attributes:
        chunk: int32 ``[tiles]`` whose tokens.
        first: int32 ``[tiles]`` the tile's first token, counted from the chunk's.
        rows: query rows of a tile, of :func:`tile_rows`: tokens times heads of a group, as many whole tokens as go in.
        splits: parts that the keys of a tile are cut into; more than 1 for tiles of one token alone.
    """

    chunk: Tensor
    first: Tensor
    rows: int
    splits: int = 1


def tile_rows(group: int, decode: bool) -> int:
    """Returns the rows of a tile of one token, or of a prompt's, where ``group`` query heads share a key-value head."""
    least = max(DECODE_ROWS, triton.next_power_of_2(group))
    return least if decode else max(PROMPT_ROWS, least)


def splits_for(decodes: int, kv_heads: int, longest: int, processors: int) -> int:
    """Returns the parts to cut decode tiles into so that few of them fill the device: a power of two up to 16.

    Args:
        decodes: tiles of one token in the pass.
        longest: keys that the longest of them sees.
        processors: of the device.
    """
    programs = max(1, decodes * kv_heads)
    most = min(PROGRAMS_EACH * processors // programs, longest // PART_KEYS, MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)


# They lie in one buffer, where an array begins anywhere: code that counted on 16 bytes would be compiled anew whenever
# one moved.
FIGURES = ["chunk_begin", "chunk_start", "chunk_length", "chunk_row", "table", "tile_chunk", "tile_first"]


@triton.jit
def _over_keys(
    query, peak, total, attended, keys, values, own_table, kv_head, last, seen, begin, end, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Goes on with the online softmax over steps ``begin`` to ``end`` of KEYS keys; all see all unless MASKED."""
    lane = tl.arange(0, LANES)
    for step in range(begin, end):
        block = tl.load(own_table + step * KEYS // BLOCK_SIZE).to(tl.int64)
        place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + step * KEYS % BLOCK_SIZE
        at = (place + tl.arange(0, KEYS))[:, None] * HEAD_DIM + lane[None, :]
        position = step * KEYS + tl.arange(0, KEYS)
        if MASKED:
            there = (position < seen)[:, None] & (lane < HEAD_DIM)[None, :]
            key = tl.load(keys + at, mask=there, other=0.0)
            value = tl.load(values + at, mask=there, other=0.0)
        elif LANES == HEAD_DIM:
            key, value = tl.load(keys + at), tl.load(values + at)
        else:
            key = tl.load(keys + at, mask=(lane < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(values + at, mask=(lane < HEAD_DIM)[None, :], other=0.0)
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            score = tl.where(position[None, :] <= last[:, None], score, -1.0e30)
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        attended = tl.dot(weight.to(value.dtype), value, attended * fade[:, None], input_precision="ieee")
        peak = higher
    return peak, total, attended


@triton.jit(do_not_specialize=["table_width"], do_not_specialize_on_alignment=FIGURES)
def attention_kernel(
    qkv, keys, values, out, peaks, sums,
    chunk_begin, chunk_start, chunk_length, chunk_row, table, table_width, tile_chunk, tile_first, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    TWO_LOOPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program a tile, key-value head and part. ``scale`` has log2(e) in it: powers of two are what the device has."""
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunk = tl.load(tile_chunk + tile)
    first = tl.load(tile_first + tile)
    begin, start = tl.load(chunk_begin + chunk), tl.load(chunk_start + chunk)
    length = tl.load(chunk_length + chunk)
    own_table = table + tl.load(chunk_row + chunk).to(tl.int64) * table_width
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    lane = tl.arange(0, LANES)
    stored = ((row < TOKENS * GROUP) & (token < length))[:, None] & (lane < HEAD_DIM)[None, :]
    pass_row = (begin + token).to(tl.int64)
    query_at = pass_row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + head * HEAD_DIM
    query = tl.load(qkv + query_at[:, None] + lane[None, :], mask=stored, other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    last = start + token  # key that a row sees last; rows that are not stored see zeros
    seen = start + tl.minimum(first + TOKENS, length)  # keys that the tile's last token sees
    steps = (seen + KEYS - 1) // KEYS
    each = (steps + SPLITS - 1) // SPLITS
    step = part * each
    end = tl.minimum(step + each, steps)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    attended = tl.full([ROWS, LANES], 0.0, tl.float32)
    if TWO_LOOPS:
        # Steps that the tile's first token sees whole need no mask; in a short decode a second loop costs more.
        full = tl.minimum(tl.maximum(step, (start + first + 1) // KEYS), end)
        peak, total, attended = _over_keys(
            query, peak, total, attended, keys, values, own_table, kv_head, last, seen, step, full, scale,
            KV_HEADS, HEAD_DIM, LANES, BLOCK_SIZE, KEYS, False, WIDE,
        )  # fmt: skip
        step = full
    peak, total, attended = _over_keys(
        query, peak, total, attended, keys, values, own_table, kv_head, last, seen, step, end, scale,
        KV_HEADS, HEAD_DIM, LANES, BLOCK_SIZE, KEYS, True, WIDE,
    )  # fmt: skip
    if SPLITS == 1:
        out_at = ((pass_row * HEADS + head) * HEAD_DIM)[:, None] + lane[None, :]
        tl.store(out + out_at, (attended / total[:, None]).to(out.dtype.element_ty), mask=stored)
    else:
        one = (tile.to(tl.int64) * HEADS + head) * SPLITS + part
        tl.store(peaks + one, peak, mask=row < GROUP)
        tl.store(sums + one, total, mask=row < GROUP)
        tl.store(out + one[:, None] * HEAD_DIM + lane[None, :], attended, mask=stored)


@triton.jit(do_not_specialize_on_alignment=["chunk_begin", "tile_chunk", "tile_first"])
def join_kernel(
    parts, peaks, sums, out, chunk_begin, tile_chunk, tile_first,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr, SPLIT_LANES: tl.constexpr,
):  # fmt: skip
    """A program a tile (of one token) and head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    split, lane = tl.arange(0, SPLIT_LANES), tl.arange(0, LANES)
    held = lane < HEAD_DIM
    one = (tile.to(tl.int64) * HEADS + head) * SPLITS + split
    peak = tl.load(peaks + one, mask=split < SPLITS, other=-1.0e30)
    factor = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(sums + one, mask=split < SPLITS, other=0.0) * factor, 0)
    mask = (split < SPLITS)[:, None] & held[None, :]
    part = tl.load(parts + one[:, None] * HEAD_DIM + lane[None, :], mask=mask, other=0.0)
    result = tl.sum(part * factor[:, None], 0) / total
    row = (tl.load(chunk_begin + tl.load(tile_chunk + tile)) + tl.load(tile_first + tile)).to(tl.int64)
    written = tl.where(total > 0.0, HEAD_DIM, 0)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=lane < written)


@dataclass(frozen=True, slots=True)
class Parts:
    """Room for the parts of split tiles.

    Attributes:
        attended: float32 ``[tiles * heads * splits * head_dim]`` or more.
        peaks, sums: float32 ``[tiles * heads * splits]`` or more.
    """

    attended: Tensor
    peaks: Tensor
    sums: Tensor

    @classmethod
    def of(cls, group: int, head_dim: int, processors: int, device: torch.device) -> Parts:
        """Allocates for whatever :func:`splits_for` gives on a device of so many processors."""
        most = PROGRAMS_EACH * processors * group
        attended, peaks, sums = (torch.empty(most * size, device=device) for size in (head_dim, 1, 1))
        return cls(attended, peaks, sums)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    chunks: Chunks,
    tiles: Tiles,
    scale: float,
    parts: Parts | None = None,
) -> None:
    """Writes what the tokens of ``tiles`` attend to.

    Args:
        qkv: ``[tokens, (heads + 2 * kv_heads) * head_dim]``, its queries turned; contiguous.
        keys, values: one layer's cache, ``[blocks, kv_heads, block_size, head_dim]``, the pass's own in it; a block is
            a power of two from 16 tokens.
        out: ``[tokens, heads * head_dim]``, contiguous.
        scale: of the scores.
        parts: room, where ``tiles.splits`` is more than 1.
    """
    _, kv_heads, block_size, head_dim = keys.shape
    heads = out.shape[1] // head_dim
    lanes = triton.next_power_of_2(head_dim)
    split = tiles.splits > 1
    assert not split or parts is not None
    target, peaks, sums = (parts.attended, parts.peaks, parts.sums) if split and parts else (out, out, out)
    attention_kernel[(len(tiles.chunk), kv_heads, tiles.splits)](
        qkv, keys, values, target, peaks, sums,
        chunks.begin, chunks.start, chunks.length, chunks.row, chunks.table, chunks.table.shape[1],
        tiles.chunk, tiles.first, scale * 1.4426950408889634,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, LANES=lanes, BLOCK_SIZE=block_size, ROWS=tiles.rows,
        KEYS=min(block_size, MOST_KEYS), SPLITS=tiles.splits, TWO_LOOPS=tiles.rows >= PROMPT_ROWS, WIDE=_wide(qkv),
        num_warps=WARPS, num_stages=STAGES, **OPTIONS,
    )  # fmt: skip
    if split:
        join_kernel[(len(tiles.chunk), heads)](
            target, peaks, sums, out, chunks.begin, tiles.chunk, tiles.first,
            HEADS=heads, HEAD_DIM=head_dim, LANES=lanes, SPLITS=tiles.splits,
            SPLIT_LANES=triton.next_power_of_2(tiles.splits), num_warps=2, **OPTIONS,
        )  # fmt: skip


def _wide(qkv: Tensor) -> bool:
    """Whether products are to be computed in float32: Triton's interpreter multiplies bfloat16 wrongly."""
    return qkv.device.type == "cpu" and qkv.dtype is torch.bfloat16
