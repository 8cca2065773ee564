"""From token ids to rows of the embedding, and from logits to token ids; the ids never leave the device between."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels import OPTIONS

BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["sources", "previous"])
def embed_kernel(sources, previous, table, out, columns, BLOCK: tl.constexpr):
    """A program a token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + token).to(tl.int64)
    pending = source < 0
    kept = tl.load(previous + tl.where(pending, -source - 1, 0)).to(tl.int64)
    number = tl.maximum(tl.where(pending, kept, source), 0)  # -1 stands for logits that were no numbers
    inside = lane < columns
    row = tl.load(table + number * columns + lane, mask=inside, other=0.0)
    tl.store(out + token * columns + lane, row, mask=inside)


def embed(sources: Tensor, previous: Tensor, table: Tensor, out: Tensor) -> None:
    """Writes the embeddings of a pass's tokens to ``out``, ``[tokens, hidden]``.

    Args:
        sources: int32 ``[tokens]``: a token's id, or ``-(row + 1)`` for the id that the pass before gave to that row.
        previous: int32 ``[rows]``, the ids of the pass before.
        table: ``[vocabulary, hidden]``.
    """
    tokens, columns = out.shape
    embed_kernel[(tokens, triton.cdiv(columns, BLOCK))](sources, previous, table, out, columns, BLOCK=BLOCK, **OPTIONS)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["ids", "best_values"])
def argmax_kernel(logits, ids, best_values, columns, first, BLOCK: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    best = float("-inf")
    where = -1
    for begin in range(0, columns, BLOCK):
        lane = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + row * columns + lane, mask=lane < columns, other=float("-inf")).to(tl.float32)
        value = tl.where(value == value, value, float("-inf"))
        top = tl.max(value, 0)
        place = tl.min(tl.where(value == top, lane, columns), 0)
        better = top > best
        where = tl.where(better, place + first, where)
        best = tl.where(better, top, best)
    tl.store(ids + row, where)
    tl.store(best_values + row, best)


def argmax(logits: Tensor, ids: Tensor, values: Tensor, first: int = 0) -> None:
    """Writes each row's best id, the lowest on ties, and its logit; -1 and -inf where no logit is a number.

    Args:
        logits: ``[rows, columns]``, contiguous.
        ids: int32 ``[rows]``.
        values: float32 ``[rows]``.
        first: id of the first column: a rank's part of the vocabulary may begin anywhere.
    """
    rows, columns = logits.shape
    argmax_kernel[(rows,)](logits, ids, values, columns, first, BLOCK=4 * BLOCK, num_warps=8, **OPTIONS)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["all_ids", "all_values", "ids"])
def choose_kernel(all_ids, all_values, ids, rows, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block of rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    where = tl.full([BLOCK], -1, tl.int32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for rank in range(RANKS):
        value = tl.load(all_values + rank * rows + row, mask=inside, other=float("-inf"))
        better = value > best
        where = tl.where(better, tl.load(all_ids + rank * rows + row, mask=inside, other=-1), where)
        best = tl.where(better, value, best)
    tl.store(ids + row, where, mask=inside)


def choose(all_ids: Tensor, all_values: Tensor, ids: Tensor) -> None:
    """Writes to ``ids``, int32 ``[rows]``, each row's best among the ranks' parts; the lowest id on ties.

    Args:
        all_ids, all_values: int32 and float32 ``[ranks, rows]``, ranks in the order of their parts of the vocabulary.
    """
    ranks, rows = all_ids.shape
    choose_kernel[(triton.cdiv(rows, BLOCK),)](all_ids, all_values, ids, rows, RANKS=ranks, BLOCK=BLOCK, **OPTIONS)
