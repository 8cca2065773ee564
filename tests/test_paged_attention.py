"""Attention over blocks in plain PyTorch: sums that do not depend on chance, scores that are not rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.ds_inference import static_cache
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.paged_attention import KvCache, build_plan, by_index, by_segment, ragged_attention
from harness.engines.shared.attention_scores import scores

BLOCK, KV_HEADS, GROUP, HEAD_DIM = 4, 2, 3, 8
CPU = torch.device("cpu")


def batch_of(visible: list[int], blocks: list[int]) -> RaggedBatch:
    """Returns a pass of decodes, each of which sees so many tokens, over these blocks of the pool."""
    chunks, left = [], list(blocks)
    for uid, tokens in enumerate(visible):
        sequence = Sequence(uid, [1] * tokens, tokens, 9)
        sequence.blocks = [left.pop(0) for _ in range(-(-tokens // BLOCK))]
        chunks.append((sequence, tokens - 1, 1, True))
    return RaggedBatch(chunks, len(chunks), 0)


def pool(blocks: int, dtype: torch.dtype, scale: float = 1.0) -> KvCache:
    generator = torch.Generator().manual_seed(blocks)
    shape = (blocks, KV_HEADS, BLOCK, HEAD_DIM)
    return KvCache(*((torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(2)))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 200), st.randoms(use_true_random=False))
def test_segments_sum_what_the_index_says(visible: list[int], more: int, chance: object) -> None:
    needed = sum(-(-tokens // BLOCK) for tokens in visible)
    blocks = list(range(needed + more))  # few others: a prefix of the pool; many: single blocks
    chance.shuffle(blocks)  # type: ignore[attr-defined]
    decodes = build_plan(batch_of(visible, blocks), [pool(len(blocks), torch.float32)], CPU).decodes
    assert decodes is not None
    parts = torch.randint(-1000, 1000, (len(decodes.owner), 2, 3)).float()  # whole numbers: exact in any order
    assert torch.equal(by_segment(parts, decodes), by_index(parts, decodes))


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_scores_are_not_rounded_before_the_softmax(spread: float) -> None:
    visible = [40, 33, 7]
    plan = build_plan(batch_of(visible, list(range(30))), [pool(30, torch.bfloat16, spread)], CPU)
    tokens = len(visible)
    query = torch.randn(1, KV_HEADS * GROUP, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    query = (query * spread).bfloat16()
    new = torch.zeros(2, 1, KV_HEADS, tokens, HEAD_DIM).bfloat16() + 0.5
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    found, _ = ragged_attention(module, query, new[0], new[1], None, ragged=plan)
    for row, count in enumerate(visible):
        blocks = torch.tensor(list(range(30))[sum(-(-n // BLOCK) for n in visible[:row]) :][: -(-count // BLOCK)])
        keys, values = (
            stored[blocks].transpose(0, 1).flatten(1, 2)[:, :count].double()
            for stored in (plan.caches[0].keys, plan.caches[0].values)
        )
        grouped = query[0, :, row].double().view(KV_HEADS, GROUP, HEAD_DIM)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) * HEAD_DIM**-0.5, -1)
        exact = (weights @ values).flatten(0, 1)
        # What is left is the rounding of weights, of each block's part and of the result, 2^-9 each.
        assert (found[0, row].double() - exact).abs().max() <= 4 * 2**-9 * values.abs().max()


def test_scores_of_halves_are_those_of_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(5, KV_HEADS, GROUP, 64, generator=generator).bfloat16()
    keys = torch.randn(5, KV_HEADS, 16, 64, generator=generator).bfloat16()
    found = scores(query, keys)
    assert found.dtype is torch.float32 and found.shape == (5, KV_HEADS, GROUP, 16)
    torch.testing.assert_close(found, (query.double() @ keys.double().transpose(2, 3)).float())
    assert static_cache.scores is scores
