"""The Triton kernels against float64: interpreted on the CPU, or on a GPU where there is one.

The interpreter multiplies bfloat16 matrices wrongly, so that kernels that it runs widen them to float32 first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from support import kernel_checks
from support.attention import Ragged, Shape
from support.rounding import near

from harness.engines.fastgen.runners.triton.kernels.attention import (
    MOST_SPLITS,
    PROGRAMS_EACH,
    Parts,
    splits_for,
    tile_rows,
)
from harness.engines.fastgen.runners.triton.kernels.sampling import argmax

pytestmark = [pytest.mark.usefixtures("one_thread"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS, GROUPS, BLOCK_SIZES, SPLITS = (64, 80, 96, 128), (1, 2, 3, 4, 5, 7, 8), (16, 32, 64, 128), (1, 2, 4, 8)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_of_every_head_size_and_ratio(head_dim: int, group: int) -> None:
    pick = random.Random(head_dim * group)
    shape = Shape(head_dim, group, 1, pick.choice(BLOCK_SIZES), pick.choice(DTYPES), DEVICE)
    ragged = Ragged(shape, [(pick.randrange(1, 90), 1), (pick.randrange(40), pick.randrange(2, 20))], group)
    ragged.check(pick.choice(SPLITS))


cases = {
    "shape": st.builds(
        Shape,
        *(st.sampled_from(values) for values in (HEAD_DIMS, GROUPS, (1, 2), BLOCK_SIZES, DTYPES)),
        st.just(DEVICE),
    ),
    "splits": st.sampled_from(SPLITS),
    "seed": st.integers(0, 99),
}
decode = st.tuples(st.integers(1, 200), st.just(1))
prompt = st.tuples(st.one_of(st.just(0), st.integers(1, 120)), st.integers(1, 40))


def ragged_batches(examples: int, most: int) -> Callable[[], None]:
    """Returns a check of that many batches of up to ``most`` sequences."""

    @settings(max_examples=examples)
    @given(spans=st.lists(st.one_of(decode, prompt), min_size=1, max_size=most), **cases)
    def check(shape: Shape, spans: list[tuple[int, int]], splits: int, seed: int) -> None:
        ragged = Ragged(shape, spans, seed)
        ragged.check(splits)

    return check


def test_attention_of_ragged_batches() -> None:
    ragged_batches(12, 8)()


@pytest.mark.slow
def test_attention_of_many_ragged_batches(scale: Callable[..., Any]) -> None:
    ragged_batches(scale(20, 300), 64)()


def test_attention_of_64_sequences_is_the_same_every_time() -> None:
    pick = random.Random(0)
    spans = [(pick.randrange(1, 50), 1) if pick.random() < 0.9 else (pick.randrange(30), 9) for _ in range(64)]
    ragged = Ragged(Shape(64, 4, 1, 16, torch.float16, DEVICE), spans, 1)
    first = ragged.attended(2)
    near(first, ragged.expected, ragged.bound())
    few = Ragged(Shape(64, 4, 1, 16, torch.float16, DEVICE), spans[:8], 1)
    assert torch.equal(few.attended(2), few.attended(2))


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 / 0 of the row that is not stored
@pytest.mark.parametrize("splits", [1, 2])
def test_a_chunk_of_no_tokens_writes_nothing(splits: int) -> None:
    """What fills up a graph's tiles; were it written, then over the first chunk's row."""
    ragged = Ragged(Shape(64, 4, 1, 16, torch.float16, DEVICE), [(40, 1), (70, 1)], 0)
    for figure in (ragged.chunks.begin, ragged.chunks.length, ragged.chunks.start):
        figure[1] = 0
    near(ragged.attended(splits)[:1], ragged.expected[:1], ragged.bound()[:1])


def test_a_prompt_of_several_tiles_and_many_blocks() -> None:
    ragged = Ragged(Shape(64, 8, 1, 32, torch.float16, DEVICE), [(70, 45), (0, 33)], 2)
    ragged.check()


def test_tiles_and_parts_fill_a_device() -> None:
    assert [tile_rows(group, decode=True) for group in (1, 7, 16)] == [16, 16, 16]
    assert [tile_rows(group, decode=False) for group in (1, 7, 16)] == [64, 64, 64]
    assert splits_for(256, 32, 4096, 132) == 1  # fills it as it is
    assert splits_for(1, 8, 4096, 132) == MOST_SPLITS
    assert splits_for(1, 8, 300, 132) == 2  # no part is under 128 keys
    assert splits_for(0, 8, 0, 132) == 1


@given(st.integers(1, 600), st.sampled_from((1, 2, 4, 8, 32)), st.integers(1, 40000), st.integers(1, 200))
def test_parts_fit_their_room(decodes: int, kv_heads: int, longest: int, processors: int) -> None:
    splits = splits_for(decodes, kv_heads, longest, processors)
    assert splits in (1, 2, 4, 8, 16)
    group, head_dim = 3, 4
    if splits > 1:
        assert decodes * kv_heads * splits <= PROGRAMS_EACH * processors
        room = Parts.of(group, head_dim, processors, torch.device("meta"))
        assert len(room.sums) >= decodes * kv_heads * group * splits
        assert len(room.attended) == head_dim * len(room.peaks)


@dtypes
@pytest.mark.parametrize("columns", [1, 100, 576, 2049])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "added"])
def test_norm(columns: int, adds: bool, dtype: torch.dtype) -> None:
    kernel_checks.norm(columns, adds, dtype, DEVICE)


@dtypes
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (7, 1, 80), (9, 3, 96), (20, 4, 128)])
def test_rotary_turns_and_stores(heads: int, kv_heads: int, head_dim: int, norms: bool, dtype: torch.dtype) -> None:
    kernel_checks.rotary(heads, kv_heads, head_dim, norms, dtype, DEVICE)


@dtypes
@pytest.mark.parametrize("inner", [3, 1024, 1100])
def test_silu(inner: int, dtype: torch.dtype) -> None:
    kernel_checks.silu(inner, dtype, DEVICE)


@dtypes
def test_embed_takes_ids_and_what_the_pass_before_gave(dtype: torch.dtype) -> None:
    kernel_checks.embedding(1100, 50, dtype, DEVICE)


@given(st.integers(1, 9000), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 999))
@settings(max_examples=25)
def test_argmax_takes_the_lowest_of_equals(columns: int, levels: int, dtype: torch.dtype, seed: int) -> None:
    kernel_checks.best(columns, dtype, DEVICE, levels=levels, seed=seed)


@dtypes
def test_argmax_of_what_is_no_number(dtype: torch.dtype) -> None:
    logits = torch.full((2, 5000), float("nan"), dtype=dtype, device=DEVICE)
    ids, values = kernel_checks.whole([9, 9], DEVICE), torch.empty(2, device=DEVICE)
    argmax(logits, ids, values)
    assert ids.tolist() == [-1, -1]
    assert values.tolist() == [float("-inf")] * 2


def test_choose_takes_the_best_of_all_ranks() -> None:
    kernel_checks.best_of_ranks(4, DEVICE)
