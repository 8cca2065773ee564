"""The FastGen engine in this process, on tiny models with random weights: parity, attention, rejection, stopping.

It runs on the PyTorch kernels; the native ones have tests of their own.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.engines import generate, hugging_face, requests, settings
from torch.nn.functional import scaled_dot_product_attention

from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.paged_attention import KvCache, build_plan, ragged_attention
from harness.engines.shared.attention_checks import refuse_unusual_attention
from harness.engines.shared.kv_memory import kv_memory_bytes
from harness.engines.shared.order import Order
from harness.workload.records import PassRecord, Request


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite"])
def test_every_llama_like_model_gives_hugging_face_ids(model_type: str) -> None:
    more = {"sliding_window": None, "pad_token_id": 0} if model_type in ("mistral", "phi3") else {"pad_token_id": 0}
    chosen = settings(model_type, more=more, token_budget=40, max_sequences=8, kv_block_size=8)
    jobs = requests(12)
    engine = FastGenEngine(chosen)
    engine.load()
    found = generate(engine, jobs)
    assert {index: completion.token_ids for index, completion in found.items()} == hugging_face(chosen.source, jobs)


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(
    ("budget", "sequences", "blocks"),
    [pytest.param(5, 5, 23, marks=pytest.mark.slow), (8, 3, 60), (64, 40, 24), (300, 64, 500)],
)
def test_budgets_and_cache_sizes_do_not_change_a_token(budget: int, sequences: int, blocks: int, order: Order) -> None:
    per_block = 2 * 3 * 2 * 8 * 16 * 4
    chosen = settings(
        token_budget=budget, max_sequences=sequences, kv_block_size=8, kv_memory=blocks * per_block, order=order
    )
    engine = FastGenEngine(chosen)
    engine.load()
    assert engine.total_blocks == blocks
    engine.warm_up()
    jobs = requests(30)
    passes: list[PassRecord] = []
    engine.on_pass = passes.append
    found = generate(engine, jobs)
    assert {index: completion.token_ids for index, completion in found.items()} == hugging_face(chosen.source, jobs)
    statistics = engine.statistics
    assert statistics.preemptions is not None
    if blocks == 500:
        assert statistics.preemptions == 0
    if blocks == 24 and order is Order.longest_first:
        assert statistics.preemptions > 0
    assert statistics.steps == len(passes)
    # Each token once: no token lost or counted twice by splitting, composing or preempting.
    fed = sum(record.tokens for record in passes)
    assert statistics.recomputed_tokens is not None
    assert fed == sum(c.prompt_tokens + c.output_tokens - 1 for c in found.values()) + statistics.recomputed_tokens
    assert sum(record.logit_rows or 0 for record in passes) == sum(c.output_tokens for c in found.values())
    if not statistics.preemptions:  # each token sees itself and those before it
        fed_each = [c.prompt_tokens + c.output_tokens - 1 for c in found.values()]
        assert sum(record.attention_pairs or 0 for record in passes) == sum(n * (n + 1) // 2 for n in fed_each)
    assert all((record.kv_read_tokens or 0) >= record.tokens for record in passes)
    for job in jobs:
        assert found[job.index].prompt_tokens == len(job.prompt_ids or ())
        assert found[job.index].output_tokens == job.output_len
        assert found[job.index].first_token_s is not None
        assert found[job.index].first_token_s <= found[job.index].finished_s


def test_eos_ends_a_sequence_and_is_counted() -> None:
    jobs = requests(20)
    free = hugging_face(settings().source, jobs)
    eos = max((ids[len(ids) // 2] for ids in free.values()), key=lambda token: sum(token in i for i in free.values()))
    chosen = settings(stop=Stop.eos, more={"eos_token_id": eos}, token_budget=64, max_sequences=8, kv_block_size=8)
    engine = FastGenEngine(chosen)
    engine.load()
    found = generate(engine, jobs)
    stopped = {index: c.token_ids for index, c in found.items() if c.finish_reason == "eos"}
    assert stopped
    for index, ids in free.items():
        expected = ids[: ids.index(eos) + 1] if eos in ids else ids
        assert found[index].token_ids == expected
        assert found[index].output_tokens == len(expected)
        assert (found[index].finish_reason == "eos") == (expected[-1] == eos)


def test_too_long_requests_are_rejected_and_the_rest_run() -> None:
    per_block = 2 * 3 * 2 * 8 * 16 * 4
    engine = FastGenEngine(settings(token_budget=64, max_sequences=8, kv_block_size=8, kv_memory=20 * per_block))
    engine.load()
    jobs = [
        Request(0, "", 10, prompt_ids=(5,) * 100),
        Request(1, "", 10, prompt_ids=(5,) * 250),  # 260 tokens in a context of 256
        Request(2, "", 60, prompt_ids=(5,) * 101),  # 160 slots: exactly 20 blocks
        Request(3, "", 61, prompt_ids=(5,) * 101),  # one more
        Request(4, "", 3, prompt_ids=()),
    ]
    found = generate(engine, jobs)
    assert {index: c.finish_reason for index, c in found.items()} == {
        0: "length",
        1: "rejected",
        2: "length",
        3: "rejected",
        4: "rejected",
    }
    assert found[1].error is not None
    assert "context of 256" in found[1].error
    assert found[3].error is not None
    assert "needs 21 KV blocks" in found[3].error
    assert found[3].prompt_tokens == found[3].output_tokens == 0
    assert found[2].output_tokens == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
def test_ragged_attention_equals_attention_sequence_by_sequence(dtype: torch.dtype, scattered: bool) -> None:
    """Decodes over a dense prefix and over scattered blocks, first chunks and later chunks, in one pass."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, block_size, total = 6, 2, 16, 4, 200
    cache = KvCache(*(torch.zeros(total, kv_heads, block_size, head_dim, dtype=dtype) for _ in range(2)))
    shapes = [(0, 9), (12, 1), (30, 1), (7, 6), (0, 1), (16, 4)]  # tokens in the cache before, tokens in the pass
    numbers = list(range(total if scattered else 25))
    random.Random(1).shuffle(numbers)
    chunks, keys, values = [], [], []
    for uid, (start, length) in enumerate(shapes):
        blocks = [numbers.pop() for _ in range(-(-(start + length) // block_size))]
        sequence = Sequence(uid, [0] * (start + length), start + length, 1, start, blocks)
        chunks.append((sequence, start, length, True))
        key, value = (torch.randn(start + length, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        for position in range(start):
            cache.keys[blocks[position // block_size], :, position % block_size] = key[position]
            cache.values[blocks[position // block_size], :, position % block_size] = value[position]
        keys.append(key)
        values.append(value)
    query = torch.randn(1, heads, sum(length for _, length in shapes), head_dim, dtype=dtype)
    new_keys, new_values = (
        torch.cat([whole[start:] for whole, (start, _) in zip(wholes, shapes, strict=True)]).transpose(0, 1)[None]
        for wholes in (keys, values)
    )
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    plan = build_plan(RaggedBatch(chunks, 0, query.shape[2]), [cache], torch.device("cpu"))
    assert plan.decodes is not None
    assert isinstance(plan.decodes.blocks, torch.Tensor) == scattered
    output, weights = ragged_attention(module, query, new_keys, new_values, None, scaling=0.3, ragged=plan)
    assert weights is None
    assert output.shape == (1, query.shape[2], heads, head_dim)
    row = 0
    for (start, length), key, value in zip(shapes, keys, values, strict=True):
        visible = torch.arange(start + length)[None] <= torch.arange(start, start + length)[:, None]
        expected = scaled_dot_product_attention(
            query[:, :, row : row + length].float(),
            key.transpose(0, 1)[None].float(),
            value.transpose(0, 1)[None].float(),
            attn_mask=visible,
            scale=0.3,
            enable_gqa=True,
        )
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(
            output[:, row : row + length].transpose(1, 2).float(), expected, atol=tolerance, rtol=tolerance
        )
        row += length


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(0.5, 500), (1, 1000), (1.0, 1000), (2048, 2048), ("2KiB", 2048), ("0.25", 250), ("0.5B", 0)],
)
def test_kv_memory_is_a_fraction_up_to_one_and_bytes_above(setting: Any, expected: int) -> None:
    assert kv_memory_bytes(setting, 1000) == expected


def test_a_cache_smaller_than_a_block_is_refused() -> None:
    engine = FastGenEngine(settings(kv_memory=100))
    with pytest.raises(UserError, match=r"^engine\.kv_memory: 100 is 100 bytes, less than one block of 64 tokens"):
        engine.load()


def test_a_cache_larger_than_the_memory_is_refused() -> None:
    engine = FastGenEngine(settings(kv_memory="100000GiB", kv_block_size=2**20, max_sequences=512, token_budget=512))
    with pytest.raises(UserError, match=r"^engine\.kv_memory: 100000GiB asks for 100000\.0 GiB, .* are free"):
        engine.load()


def test_sliding_windows_below_the_context_are_refused() -> None:
    from transformers import Gemma2Config, LlamaConfig, MistralConfig

    for config in (LlamaConfig(), MistralConfig(sliding_window=None), MistralConfig(sliding_window=4096)):
        refuse_unusual_attention(config.to_dict(), 4096, "fastgen")
    for config in (MistralConfig(sliding_window=1024), Gemma2Config()):
        with pytest.raises(UserError, match=r"^model: .*engine=baseline"):
            refuse_unusual_attention(config.to_dict(), 8192, "fastgen")
