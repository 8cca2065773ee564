"""The MII adapter on MII's real classes. Only the forward pass is replaced, where there is no GPU to compute it.

MII is imported inside the tests: where it is missing or broken they fail, and the other modules' tests still run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.inference.v2.ragged import PlaceholderSequenceDescriptor
from deepspeed.inference.v2.ragged.manager_configs import AllocationMode, MemoryConfig
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import mii
from support.engines import requests as jobs_of
from support.mii import (
    CONTEXT,
    VOCABULARY,
    BlockArithmetic,
    counted,
    counting,
    engine_on_cpu,
    hugging_face,
    last_logits,
    pipeline_of,
    run,
    settings_of,
)
from support.runs import together

from harness.basics.clock import Clock
from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.engines.base import Progress
from harness.engines.mii.settings import generation_settings, memory_settings, model_settings
from harness.engines.shared.order import Order
from harness.models.ends import Ends
from harness.models.tokenizer import ByteTokenizer
from harness.ranks.rank import free_port
from harness.ranks.tensor_parallel import TensorParallel
from harness.workload.records import PassRecord, Request

no_gpu, tiny, nothing_unsupported = mii.no_gpu, mii.tiny, mii.nothing_unsupported

GIB = 2**30


# What MII is told


def test_settings_reach_mii_and_deepspeed() -> None:
    from mii.config import ModelConfig

    from harness.engines.mii.pipeline import TokenIds

    settings = settings_of(token_budget=300, max_sequences=40, quantization="wf6af16")
    tokens = TokenIds(VOCABULARY)
    config = ModelConfig(**model_settings(settings, "/models/llama", tokens, {"mode": "allocate", "size": 77}, 5, 6))
    engine = config.inference_engine_config
    assert (config.model_name_or_path, config.tokenizer, config.max_length) == ("/models/llama", tokens, CONTEXT)
    assert (config.zmq_port_number, config.torch_dist_port) == (5, 6)
    assert (config.tensor_parallel, engine.tensor_parallel.tp_size) == (1, 1)
    assert engine.quantization.quantization_mode == "wf6af16"
    manager = engine.state_manager
    assert (manager.max_ragged_batch_size, manager.max_ragged_sequence_count) == (300, 40 + 300 // 64)
    assert (manager.max_context, manager.max_tracked_sequences) == (CONTEXT, 2048)
    assert (AllocationMode(manager.memory_config.mode), manager.memory_config.size) == (AllocationMode.ALLOCATE, 77)


def test_tensor_parallel_size_is_the_groups_and_not_the_environments() -> None:
    from mii.config import ModelConfig

    from harness.engines.mii.pipeline import TokenIds

    group = TensorParallel(rank=0, size=4, leader=0, group=None, messages=None)
    settings = replace(settings_of(), tensor=group, max_context=None)
    more = ModelConfig(**model_settings(settings, "/models/llama", TokenIds(9), {"mode": "reserve", "size": 1}, 5, 6))
    assert more.inference_engine_config.tensor_parallel.tp_size == more.tensor_parallel == 4
    assert model_settings(settings_of(), "/models/llama", TokenIds(9), {}, 5, 6)["tensor_parallel"] == 1
    many = settings_of(token_budget=4000, max_sequences=3000)  # beyond MII's default of tracked sequences
    assert ModelConfig(**model_settings(many, "/models/llama", TokenIds(9), {"size": 1}, 5, 6))


@pytest.mark.parametrize(
    ("kv_memory", "mode", "size"),
    [
        (0.25, AllocationMode.RESERVE, 45 * GIB),
        ("0.25", AllocationMode.RESERVE, 45 * GIB),
        (1, AllocationMode.RESERVE, 1_000_000_000),
        ("2GiB", AllocationMode.ALLOCATE, 1024),
        (2 * GIB + 5, AllocationMode.ALLOCATE, 1024),
    ],
)
def test_kv_memory(kv_memory: float | str, mode: AllocationMode, size: int) -> None:
    found = MemoryConfig(**memory_settings(kv_memory, 80 * GIB, 20 * GIB, 2 * 2**20, 64))
    assert (AllocationMode(found.mode), found.size) == (mode, size)


@pytest.mark.parametrize(
    ("kv_memory", "weights", "field", "words"),
    [
        ("1MiB", 20 * GIB, "engine.kv_memory", "less than one block of 64 tokens"),
        ("61GiB", 20 * GIB, "engine.kv_memory", "61.0 GiB, 60.0 GiB are free"),
        (0.5, 80 * GIB, "model", "need 80.0 GiB a device, 80.0 GiB are free"),
    ],
)
def test_kv_memory_that_cannot_be(kv_memory: float | str, weights: int, field: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        memory_settings(kv_memory, 80 * GIB, weights, 2 * 2**20, 64)
    assert caught.value.field == field


def test_generation_settings_in_miis_class() -> None:
    from mii.config import GenerateParamsConfig

    params = GenerateParamsConfig(prompt_length=11, **generation_settings(11, 5, frozenset({7, 2})))
    assert (params.max_new_tokens, params.max_length, params.min_new_tokens) == (5, 16, 0)
    assert (params.do_sample, params.top_p, params.top_k, params.temperature) == (False, 1.0, None, None)
    assert (params.ignore_eos, params.stop, params.stream) == (False, ["2", "7"], False)
    assert GenerateParamsConfig(prompt_length=11, **generation_settings(11, 5, frozenset())).ignore_eos


@pytest.mark.usefixtures("no_gpu")
def test_greedy_is_the_argmax_of_the_whole_vocabulary_and_nothing_is_sorted() -> None:
    from mii.batching import MIIPipeline
    from mii.batching.data_classes import RequestBatch
    from mii.batching.postprocess import run_batch_logit_processing, run_batch_sampler

    from harness.engines.mii.pipeline import RequestPipeline

    pipeline = pipeline_of(settings_of(), RequestPipeline, counting, 8, 8)
    stock = pipeline_of(settings_of(), MIIPipeline, counting, 8, 8)
    ids = torch.tensor([5, 6])
    ours = RequestBatch(
        [pipeline.make_request(0, uid, ids, generation_settings(2, 4, frozenset({2}))) for uid in range(50)]
    )
    theirs = RequestBatch([stock.make_request(0, uid, ids, {"max_new_tokens": 4}) for uid in range(50)])
    torch.manual_seed(0)
    logits = (torch.randn(50, VOCABULARY) * 3).bfloat16()
    logits[:, -1] = torch.where(torch.arange(50) % 2 == 0, 99.0, logits[:, -1])  # the last of the vocabulary counts
    best = logits.float().argmax(-1)
    assert run_batch_logit_processing(logits, ours, pipeline._post_processors) is logits
    assert torch.equal(run_batch_sampler(logits, ours, pipeline._post_processors), best)
    for uid, request in enumerate(ours):
        pipeline.active[uid] = SimpleNamespace(begun=True, prompt_tokens=2)
        request.seq_length = 2
    tokens, done = pipeline._process_logits(logits, ours)
    assert torch.equal(tokens, best)
    assert torch.equal(done, best == 2)
    # MII's own defaults: the tail of the distribution is masked out, and what is left is drawn from.
    processed = run_batch_logit_processing(logits, theirs, stock._post_processors)
    assert processed.isinf().any()
    drawn = run_batch_sampler(processed, theirs, stock._post_processors)
    assert not torch.equal(drawn, best)
    stock.destroy()


# The loop


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("engine", "blocks"),
    [
        pytest.param({}, 400, id="everything fits"),
        pytest.param({"token_budget": 16, "max_sequences": 5}, 400, id="prompts in pieces"),
        pytest.param({"token_budget": 64, "max_sequences": 8, "order": Order.dataset}, 30, id="small cache"),
    ],
)
def test_ids_are_hugging_faces(tiny: Any, engine: dict[str, Any], blocks: int) -> None:
    jobs = jobs_of(24)
    mii = engine_on_cpu(settings_of(**engine), last_logits(tiny), blocks)
    passes: list[PassRecord] = []
    mii.on_pass = passes.append
    progress: list[Progress] = []
    mii.on_progress = progress.append
    found = run(mii, jobs)
    assert {index: done.token_ids for index, done in found.items()} == {
        job.index: hugging_face(tiny, job, None) for job in jobs
    }
    for job in jobs:
        done = found[job.index]
        assert (done.prompt_tokens, done.output_tokens) == (len(job.prompt_ids or ()), job.output_len)
        assert done.finish_reason == "length"
        assert done.text == ByteTokenizer().decode(done.token_ids, skip_special_tokens=True)
        assert done.first_token_s is not None
        assert done.finished_s is not None
        assert 0 < done.first_token_s <= done.finished_s
    prompt_tokens = sum(len(job.prompt_ids or ()) for job in jobs)
    output_tokens = sum(job.output_len or 0 for job in jobs)
    assert sum(one.prompt_tokens for one in passes) == prompt_tokens
    assert sum(one.decode_tokens for one in passes) == output_tokens - len(jobs)  # the last token is never fed back
    assert [one.tokens for one in passes] == [sum(lengths) for lengths in mii.pipeline.inference_engine.passes]
    assert max(one.tokens for one in passes) <= mii.settings.engine.token_budget
    assert max(one.sequences for one in passes) == mii.statistics.peak_sequences
    assert mii.statistics.peak_sequences <= mii.settings.engine.max_sequences
    assert mii.statistics.steps == len(passes) == passes[-1].step
    assert progress[-1].prompt_tokens == prompt_tokens
    assert progress[-1].output_tokens == output_tokens
    assert passes[0].waiting == progress[0].waiting == len(jobs) - passes[0].sequences
    assert passes[-1].waiting == 0
    assert mii.statistics.kv_peak_utilisation == max(one.kv_utilisation or 0 for one in passes) > 0
    assert mii.statistics.mean_tokens_per_pass == (prompt_tokens + output_tokens - len(jobs)) / len(passes)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("stops", [1, 3])
def test_end_of_sequence_is_counted_and_kept(tiny: Any, stops: int) -> None:
    jobs = jobs_of(24, seed=1)
    plain = [hugging_face(tiny, job, None) for job in jobs]
    # Tokens that do come up: the last of the longest outputs, of others as well.
    ids = sorted({ids[len(ids) // 2] for ids in sorted(plain, key=len, reverse=True)[:stops]})
    mii = engine_on_cpu(settings_of(stop=Stop.eos), last_logits(tiny))
    mii.ends = Ends(frozenset(ids))
    found = run(mii, jobs)
    expected = {job.index: hugging_face(tiny, job, ids) for job in jobs}
    assert {index: done.token_ids for index, done in found.items()} == expected
    ended = {index for index, done in found.items() if done.finish_reason == "eos"}
    assert ended == {index for index, tokens in expected.items() if tokens[-1] in ids}
    assert 0 < len(ended) < len(jobs)
    assert any(len(found[index].token_ids) < (jobs[index].output_len or 0) for index in ended)
    assert all(done.output_tokens == len(done.token_ids) for done in found.values())


@pytest.mark.usefixtures("no_gpu")
def test_stop_length_passes_over_end_of_sequence() -> None:
    jobs = jobs_of(12)
    everything = frozenset(range(VOCABULARY))
    mii = engine_on_cpu(settings_of())
    assert {index: done.token_ids for index, done in run(mii, jobs).items()} == {
        job.index: counted(job) for job in jobs
    }
    mii.ends = Ends(everything)
    assert {index: done.token_ids for index, done in run(mii, jobs).items()} == {
        job.index: counted(job, everything) for job in jobs
    }
    assert {len(counted(job, everything)) for job in jobs} == {1}


@pytest.mark.usefixtures("no_gpu")
def test_where_stock_mii_loses_tokens_or_gives_up_ours_does_not() -> None:
    """Six prompts of one block grow to four blocks each, in a cache of 11 and of 10 blocks."""
    from mii.batching import MIIPipeline

    jobs = [Request(index, "", 25, prompt_ids=(index + 3,) * 8) for index in range(6)]
    settings = settings_of(order=Order.dataset)
    kwargs = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 25}

    def stock(blocks: int) -> list[Any]:
        pipeline = pipeline_of(settings, MIIPipeline, counting, blocks, 8)
        pipeline.tokenizer.decode = lambda tokens: tokens.tolist()
        try:
            return pipeline([list(job.prompt_ids or ()) for job in jobs], **dict(kwargs))
        finally:
            pipeline.destroy()

    lost = [one for one in stock(11) if one.prompt_length != 8]
    assert lost, "MII no longer moves generated tokens into the prompt"
    assert all(one.prompt_length + one.generated_length == 33 for one in lost)
    with pytest.raises(AssertionError, match="no request consumes KV cache"):
        stock(10)
    for blocks in (11, 10):
        found = run(engine_on_cpu(settings, blocks=blocks), jobs)
        assert {index: done.token_ids for index, done in found.items()} == {job.index: counted(job) for job in jobs}


@pytest.mark.usefixtures("no_gpu")
def test_starvation_would_be_loud() -> None:
    mii = engine_on_cpu(settings_of(order=Order.dataset), blocks=10)
    mii.pipeline.usable_blocks = 40  # a wrong count
    jobs = [Request(index, "", 25, prompt_ids=(index + 3,) * 8) for index in range(6)]
    with pytest.raises(RuntimeError, match=r"can schedule none of its \d+ requests: 24 of 40 KV blocks are promised"):
        list(mii.generate(iter(jobs), Clock()))


@pytest.mark.usefixtures("no_gpu")
def test_lost_tokens_would_be_loud() -> None:
    mii = engine_on_cpu(settings_of())
    mii.pipeline.make_request = _forgetful(mii.pipeline.make_request)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="request 0: 4 prompt tokens were fed and 3 came back, MII counts 3 and"):
        list(mii.generate([Request(0, "", 3, prompt_ids=(5, 6, 7, 8))], Clock()))


def _forgetful(make_request: Callable[..., Any]) -> Callable[..., Any]:
    def make(tid: int, uid: int, tokens: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        return make_request(tid, uid, tokens[1:], kwargs)

    return make


@pytest.mark.usefixtures("no_gpu")
def test_one_prompt_too_long_is_rejected_and_the_others_run() -> None:
    fits, context, cache = (5,) * 8, (5,) * (CONTEXT - 3), (5,) * 100
    jobs = [
        Request(0, "", 4, prompt_ids=fits),
        Request(1, "", 4, prompt_ids=context),
        Request(2, "", 4, prompt_ids=cache),
        Request(3, "", 4, prompt_ids=()),
        Request(4, "héllo", 4),
    ]
    found = run(engine_on_cpu(settings_of(), blocks=12), jobs)
    assert {index for index, done in found.items() if done.finish_reason == "rejected"} == {1, 2, 3}
    assert found[1].error == "prompt of 253 tokens + output_len 4 exceeds the model's context of 256"
    assert found[2].error is not None
    assert found[2].error.startswith("prompt of 100 tokens + output_len 4 needs 13 KV blocks of 8 tokens, the cache")
    assert found[3].error == "the prompt has no tokens"
    assert found[0].token_ids == counted(jobs[0])
    assert found[4].prompt_tokens == 7  # BOS and six bytes
    assert found[4].output_tokens == 4


@pytest.mark.usefixtures("no_gpu")
def test_mii_is_told_of_few_requests_that_cannot_start() -> None:
    jobs = [Request(index, "", 5, prompt_ids=(3, index % 90 + 3)) for index in range(200)]
    mii = engine_on_cpu(settings_of(max_sequences=6))
    known: list[int] = []
    mii.on_pass = lambda record: known.append(len(mii.pipeline.active))
    taken: list[int] = []

    def queue() -> Iterator[Request]:
        for job in jobs:
            taken.append(job.index)
            yield job

    stream = mii.generate(queue(), Clock())
    next(stream)
    assert max(known) == 12
    assert len(taken) == 200  # lookahead 256: the whole list may be tokenized at once
    assert len(list(stream)) == 199
    assert max(known) == 12
    few = engine_on_cpu(replace(settings_of(max_sequences=6), lookahead=4))
    taken.clear()
    next(few.generate(queue(), Clock()))
    assert len(taken) <= 6 + 2 * 4


@pytest.mark.usefixtures("no_gpu")
def test_warm_up_leaves_nothing_behind() -> None:
    mii = engine_on_cpu(settings_of(token_budget=64), blocks=20)
    mii.warm_up()
    assert mii.pipeline.inference_engine.passes[0] == [64]
    assert [1, 1] in mii.pipeline.inference_engine.passes
    jobs = jobs_of(5)
    jobs = [job for job in jobs if len(job.prompt_ids or ()) < 100]
    assert {index: done.token_ids for index, done in run(mii, jobs).items()} == {
        job.index: counted(job) for job in jobs
    }
    small = engine_on_cpu(replace(settings_of(), max_context=3))
    small.warm_up()
    assert small.pipeline.inference_engine.passes == []


@pytest.mark.usefixtures("no_gpu")
def test_longest_outputs_go_first() -> None:
    jobs = [Request(index, "", length, prompt_ids=(3,)) for index, length in enumerate([4, 9, 4, 7])]
    assert [job.index for job in engine_on_cpu(settings_of()).arrange(jobs)] == [1, 3, 0, 2]
    assert [job.index for job in engine_on_cpu(settings_of(order=Order.dataset)).arrange(jobs)] == [0, 1, 2, 3]


@given(prompt=st.integers(1, 200), output=st.integers(1, 100), block_size=st.sampled_from([8, 64, 128]))
def test_blocks_needed_are_those_that_deepspeed_takes(prompt: int, output: int, block_size: int) -> None:
    from harness.engines.mii.pipeline import RequestPipeline

    arithmetic: Any = BlockArithmetic(block_size)
    blocks, seen = 0, 0
    for fed in [prompt] + [1] * (output - 1):
        sequence = PlaceholderSequenceDescriptor(seen, blocks)
        granted, more = arithmetic.get_kv_requirements(sequence, fed, 1000)
        assert granted == fed
        blocks, seen = blocks + more, seen + fed
    promised = RequestPipeline.blocks_needed(SimpleNamespace(block_size=block_size), prompt, output)  # type: ignore[arg-type]
    assert promised == blocks


@pytest.mark.usefixtures("no_gpu")
@hypothesis_settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=25),
    blocks=st.integers(4, 40),
    block_size=st.sampled_from([4, 8]),
    max_sequences=st.integers(1, 12),
    room=st.integers(0, 40),
    lookahead=st.integers(1, 9),
    stop=st.integers(0, VOCABULARY - 1),
)
@example(lengths=[(14, 1)], blocks=4, block_size=4, max_sequences=1, room=0, lookahead=1, stop=0)  # the cache full
@example(lengths=[(10, 1)], blocks=4, block_size=4, max_sequences=1, room=0, lookahead=1, stop=0)
def test_every_token_comes_back_whatever_the_cache(
    lengths: list[tuple[int, int]],
    blocks: int,
    block_size: int,
    max_sequences: int,
    room: int,
    lookahead: int,
    stop: int,
) -> None:
    settings = settings_of(token_budget=max_sequences + room, max_sequences=max_sequences)
    mii = engine_on_cpu(replace(settings, lookahead=lookahead), blocks=blocks, block_size=block_size)
    mii.ends = Ends(frozenset({stop}))
    rng = random.Random(stop)
    jobs = [
        Request(index, "", output, prompt_ids=tuple(rng.randrange(VOCABULARY) for _ in range(prompt)))
        for index, (prompt, output) in enumerate(lengths)
    ]
    found = run(mii, jobs)
    for job in jobs:
        needed = -(-(len(job.prompt_ids or ()) + (job.output_len or 0) - 1) // block_size)
        if needed > blocks - 1:
            assert found[job.index].finish_reason == "rejected"
        else:
            assert found[job.index].token_ids == counted(job, mii.ends.eos)


# Several ranks


def rank_main(number: int, port: int, out: str) -> None:
    """One of two ranks that share a model: the leader generates, the other follows, as MII's own ranks do."""
    from mii.batching import ragged_batching

    from harness.engines.mii.engine import MiiEngine
    from harness.engines.mii.pipeline import RequestPipeline

    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if number:
        os.environ["LOCAL_RANK"] = str(number)  # MII's rank; unset is 0, where the text "0" is not
    torch.cuda.synchronize = lambda device=None: None
    ragged_batching.time = SimpleNamespace(sleep=lambda seconds: None)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    tensor = TensorParallel(number, 2, 0, None, torch.distributed.group.WORLD)
    settings = replace(settings_of(token_budget=32, max_sequences=6), tensor=tensor, host_ranks=2)
    engine = MiiEngine(settings)
    engine.tokenizer, engine.ends = ByteTokenizer(), Ends(frozenset({7}))
    shared = tensor.share(free_port())
    engine.pipeline = pipeline_of(settings, RequestPipeline, counting, 60, 8, shared)
    engine.pipeline.meet(_late(tensor, engine.pipeline.socket, f"tcp://localhost:{shared}") if number else tensor)
    engine.warm_up()
    outputs = {}
    if tensor.leads:
        outputs = {done.index: done.token_ids for done in engine.generate(jobs_of(20), Clock())}
    else:
        engine.follow()
    inner = engine.pipeline.inference_engine
    found = {"outputs": outputs, "passes": inner.passes, "free": inner.free_blocks}
    Path(out).write_text(json.dumps(found))
    torch.distributed.barrier()


def _late(tensor: TensorParallel, socket: Any, leader: str) -> Any:
    """Returns ``tensor`` for a rank whose connection to the leader stands only after three rounds of meeting."""
    socket.disconnect(leader)
    rounds: list[int] = []

    def least(heard: int) -> int:
        rounds.append(heard)
        if len(rounds) == 3:
            socket.connect(leader)
        return tensor.least(heard)

    return SimpleNamespace(leads=False, least=least)


def test_the_other_ranks_compute_the_leaders_batches(tmp_path: Path) -> None:
    importlib.import_module("mii.batching")  # said here, and not by two processes that fail
    script = "import sys, test_mii; test_mii.rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    leader, other = together(tmp_path, script, 2)
    assert {int(index): ids for index, ids in leader["outputs"].items()} == {
        job.index: counted(job, frozenset({7})) for job in jobs_of(20)
    }
    assert other["passes"] == leader["passes"]
    assert len(leader["passes"]) > 20
    assert leader["free"] == other["free"] == [60]
