"""engine=ds_inference in this process, on tiny models with random weights: parity, padding, batches, finishing."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engines import TINY, engine_for, generate, hugging_face, ids, requests

from harness.engines.ds_inference.batches import prefill_groups
from harness.engines.ds_inference.static_cache import StaticCache
from harness.models.ends import Ends
from harness.workload.records import PassRecord, Request


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite"])
def test_every_llama_like_model_gives_hugging_face_ids(model_type: str) -> None:
    engine = engine_for(model_type, batch_size=5)
    engine.warm_up()
    jobs = requests(12)
    found = generate(engine, jobs)
    assert ids(found) == hugging_face(engine.settings.source, jobs)
    for job in jobs:
        assert found[job.index].prompt_tokens == len(job.prompt_ids or ())
        assert found[job.index].output_tokens == job.output_len


@pytest.mark.parametrize(("size", "tokens"), [(1, 10_000), (3, 200), (16, 300), (40, 100_000)])
def test_batches_do_not_change_a_token_and_each_ends_on_its_own(size: int, tokens: int) -> None:
    engine = engine_for(batch_size=size, batch_tokens=tokens)
    jobs = requests(30, seed=3)
    passes: list[PassRecord] = []
    engine.on_pass = passes.append
    found = generate(engine, jobs)
    assert ids(found) == hugging_face(engine.settings.source, jobs)
    # Finished rows are in no later pass, and padding in none.
    assert sum(each.prompt_tokens for each in passes) == sum(len(job.prompt_ids or ()) for job in jobs)
    assert sum(each.decode_tokens for each in passes) == sum((job.output_len or 0) - 1 for job in jobs)
    assert engine.statistics.steps == len(passes)
    assert engine.statistics.peak_sequences is not None and engine.statistics.peak_sequences <= size


@pytest.mark.parametrize("width", [60, 200])
def test_the_fixed_cache_of_a_cuda_graph_gives_the_same_ids(width: int) -> None:
    """What a captured graph would replay, computed step by step; a batch wider than the buffers goes without."""
    engine = engine_for(batch_size=4)
    engine.batches.graphed = StaticCache(4, width, "cpu", fixed=True)
    jobs = requests(10, seed=5)
    assert ids(generate(engine, jobs)) == hugging_face(engine.settings.source, jobs)
    buffers = engine.batches.graphed.keys
    assert len(buffers) == TINY["num_hidden_layers"]
    places = [buffer.data_ptr() for buffer in buffers]
    assert ids(generate(engine, jobs)) == hugging_face(engine.settings.source, jobs)
    assert [buffer.data_ptr() for buffer in engine.batches.graphed.keys] == places  # a graph holds addresses


def test_eos_ends_a_row_and_is_counted() -> None:
    engine = engine_for(batch_size=6)
    jobs = requests(12, seed=7)
    free = ids(generate(engine, jobs))
    eos = max({token for tokens in free.values() for token in tokens}, key=lambda t: sum(t in x for x in free.values()))
    engine.batches.ends = Ends(frozenset([eos]))
    found = generate(engine, jobs)
    ended = 0
    for index, tokens in free.items():
        cut = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert found[index].token_ids == cut
        assert found[index].finish_reason == ("eos" if cut[-1] == eos else "length")
        ended += cut[-1] == eos
    assert ended


def test_too_long_requests_are_rejected_and_the_rest_run() -> None:
    engine = engine_for(batch_size=2)
    jobs = [
        Request(0, "", 10, prompt_ids=tuple([5] * 250)),  # 260 of 256
        Request(1, "", 3, prompt_ids=(5, 6)),
        Request(2, "", 1, prompt_ids=(5, 6, 7)),
    ]
    found = generate(engine, jobs)
    assert found[0].finish_reason == "rejected" and "256" in (found[0].error or "")
    assert ids(found) == {0: [], **hugging_face(engine.settings.source, jobs[1:])}


def test_neighbours_are_of_like_length() -> None:
    engine = engine_for()
    jobs = requests(50, seed=1)
    lengths = [job.output_len for job in engine.arrange(jobs)]
    assert lengths == sorted(lengths, reverse=True, key=lambda length: length or 0)


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=40))
def test_prefill_groups_take_each_row_once_and_pad_little(lengths: list[int]) -> None:
    groups = prefill_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        real = sum(lengths[row] for row in group)
        assert len(group) * max(lengths[row] for row in group) <= 1.25 * real


def test_rows_that_finish_are_overwritten_by_the_last() -> None:
    cache = StaticCache(3, 6, "cpu")
    cache.start([2, 3, 1])
    assert cache.begins == [1, 0, 2]
    rng = torch.Generator().manual_seed(random.Random(0).randrange(100))
    key = torch.randn(3, 2, 3, 4, generator=rng)
    cache.begin_prefill([0, 1, 2], 3)
    cache.attend(0, torch.randn(3, 4, 3, 4, generator=rng), key, key, 0.5)
    assert cache.drop(0) == 2
    assert cache.live == 2 and cache.begins[0] == 2
    assert torch.equal(cache.keys[0][0, :, 2:3], key[2, :, 2:3])
    assert torch.equal(cache.keys[0][1, :, :3], key[1])
