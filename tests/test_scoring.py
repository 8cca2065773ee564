"""Engine.score: teacher-forced log-probabilities of an engine's own passes against Hugging Face's."""

from __future__ import annotations

import json
import random
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_deepspeed_runner
import torch
from support.deepspeed_kernels import emulate
from support.engines import LayersThatRemember, expected, generate, requests, settings, settings_of
from support.machine import needs_native
from support.ragged import float_quantize
from support.runs import SAMPLE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.basics.errors import UserError
from harness.engines import catalogue
from harness.engines.base import Engine
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.engines.ds_inference.static_cache import StaticCache
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.scoring import Forced, Score, Scored, force, grouped
from harness.models import loading
from harness.models.ends import Ends

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 2 * 3 * 2 * 8 * 16 * 4  # bytes of a block of 8 tokens of the tiny model in float32


def items(count: int, vocab: int = 300, seed: int = 0, most: int = 30) -> list[Scored]:
    rng = random.Random(seed)
    lengths = [1, 2, 3, 7, 20, 60, 150]

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    return [Scored(index, ids(rng.choice(lengths)), ids(rng.randint(1, most))) for index in range(count)]


def differences(model: Any, wanted: list[Scored], found: dict[int, Score]) -> Tensor:
    """Returns how far each token's log-probability is from the model's; asserts that there is one for each."""
    assert found.keys() == {item.index for item in wanted}
    parts = []
    for item in wanted:
        score = found[item.index]
        assert score.error is None and len(score.logprobs) == len(item.target_ids)
        parts.append((torch.tensor(score.logprobs) - expected(model, item)[0]).abs())
    return torch.cat(parts)


def scored(engine: Engine, wanted: list[Scored], prefill: bool = False) -> dict[int, Score]:
    scores = list(engine.score(iter(wanted), prefill))
    found = {score.index: score for score in scores}
    assert len(found) == len(scores), "an item came back twice"
    return found


def engine_of(name: str, **keys: Any) -> Engine:
    chosen = settings()
    own = chosen.engine if name == chosen.engine.name else catalogue.find(name).config()
    engine = catalogue.create(replace(chosen, engine=replace(own, **keys)))
    engine.load()
    return engine


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("fastgen", {"token_budget": 300, "max_sequences": 64}),
        ("fastgen", {"token_budget": 5, "max_sequences": 5, "kv_block_size": 8, "kv_memory": 40 * BLOCK}),
        pytest.param(
            "fastgen",
            {"token_budget": 64, "max_sequences": 40, "kv_block_size": 8, "kv_memory": 24 * BLOCK},
            marks=pytest.mark.slow,
        ),
        pytest.param("ds_inference", {"batch_size": 5}, marks=pytest.mark.slow),
        ("ds_inference", {"batch_size": 16, "batch_tokens": 300}),
        ("baseline", {}),
    ],
)
def test_scores_are_hugging_faces_in_fp32(name: str, keys: dict[str, Any]) -> None:
    engine = engine_of(name, **keys)
    wanted = items(30)
    model = loading.load_model(engine.settings.source, dtype=torch.float32)
    assert differences(model, wanted, scored(engine, wanted)).max() < 1e-5
    if name == "ds_inference":
        with pytest.raises(UserError, match=r"^--prefill: ds_inference gives no logits within a prompt"):
            scored(engine, wanted, prefill=True)
    else:
        assert differences(model, wanted, scored(engine, wanted, prefill=True)).max() < 1e-5
    # Nothing of it is left behind: the requests of a run come out as they would have.
    jobs = requests(6)
    assert {index: completion.token_ids for index, completion in generate(engine, jobs).items()} == {
        index: completion.token_ids for index, completion in generate(engine_of(name, **keys), jobs).items()
    }


def test_a_preempted_sequence_is_scored_once() -> None:
    """Twelve sequences of up to ten blocks in a cache of 24: some give their blocks back in the midst of a target."""
    engine = engine_of("fastgen", token_budget=64, max_sequences=12, kv_block_size=8, kv_memory=24 * BLOCK)
    assert isinstance(engine, FastGenEngine)
    schedulers = []
    make = engine._scheduler
    engine._scheduler = lambda *given: schedulers.append(make(*given)) or schedulers[-1]  # type: ignore[method-assign, func-returns-value]
    rng = random.Random(1)
    wanted = [
        Scored(index, [rng.randrange(300) for _ in range(10)], [rng.randrange(300) for _ in range(60)])
        for index in range(12)
    ]
    found = scored(engine, wanted)
    assert schedulers[0].preemptions > 0
    assert schedulers[0].blocks.used == 0
    model = loading.load_model(engine.settings.source, dtype=torch.float32)
    assert differences(model, wanted, found).max() < 1e-5


def test_greedy_says_whether_decoding_would_give_the_target() -> None:
    """The engine's own completions are, the same with one token exchanged are not: wherever that token stands."""
    jobs = requests(10)
    for name in ("fastgen", "ds_inference", "baseline"):
        engine = engine_of(name)
        completions = generate(engine, jobs)
        own = [Scored(job.index, list(job.prompt_ids or ()), completions[job.index].token_ids) for job in jobs]
        assert all(score.greedy for score in scored(engine, own).values())
        for place in (0, -1):
            changed = [replace(item, target_ids=list(item.target_ids)) for item in own]
            for item in changed:
                item.target_ids[place] = (item.target_ids[place] + 1) % 300
            assert not any(score.greedy for score in scored(engine, changed).values())


def test_an_end_of_sequence_in_a_target_ends_nothing() -> None:
    for name in ("fastgen", "ds_inference"):
        engine = engine_of(name)
        if isinstance(engine, DsInferenceEngine):
            engine.batches.ends = Ends(frozenset([2]))
        wanted = [Scored(0, [5, 6, 7], [2, 8, 2, 9])]
        model = loading.load_model(engine.settings.source, dtype=torch.float32)
        assert differences(model, wanted, scored(engine, wanted)).max() < 1e-5


def test_choices_of_one_question_are_computed_once() -> None:
    engine = engine_of("fastgen")
    assert isinstance(engine, FastGenEngine)
    fed: list[int] = []
    compute = engine.runner.logits
    engine.runner.logits = lambda batch, rows=None: fed.append(batch.tokens) or compute(batch, rows)  # type: ignore[method-assign, func-returns-value]
    question = list(range(3, 40))
    wanted = [Scored(number, question, [40, 50, choice]) for number, choice in enumerate([60, 61, 62, 63])]
    wanted += [Scored(4, question, [40, 51, 60]), Scored(5, question, [60]), Scored(6, question, [61])]
    model = loading.load_model(engine.settings.source, dtype=torch.float32)
    found = scored(engine, wanted)
    assert differences(model, wanted, found).max() < 1e-5
    assert {index: score.greedy for index, score in found.items()} == {
        item.index: expected(model, item)[1] for item in wanted
    }
    assert sum(fed) == 3 * len(question) + 2 + 2
    fed.clear()
    assert differences(model, wanted, scored(engine, wanted, prefill=True)).max() < 1e-5
    assert (len(fed), sum(fed)) == (1, 3 * len(question) + 2 + 2)
    assert [len(forced.items) for forced in grouped(wanted)] == [4, 1, 2]


def test_what_cannot_be_computed_comes_back_with_the_reason() -> None:
    whole = list(range(3, 259))
    wanted = [
        Scored(0, whole, [5]),  # 256 tokens are fed, the last one is not
        Scored(1, whole, [5, 6]),
        Scored(2, [5], []),
        Scored(3, [], [5]),
        Scored(4, [5], [6]),
    ]
    for name in ("fastgen", "ds_inference", "baseline"):
        found = scored(engine_of(name), wanted)
        assert {index for index, score in found.items() if score.error is None} == {0, 4}
        assert found[1].error == "its 257 tokens exceed the model's context of 256"
        assert found[2].error == "there are no tokens to score"
        assert found[3].error == "there is no token before the first to be scored"
        assert not any(found[index].logprobs for index in (1, 2, 3))
    small = engine_of("fastgen", kv_block_size=8, kv_memory=10 * BLOCK)
    assert "needs 32 KV blocks of 8 tokens, the cache has 10" in (scored(small, wanted[:1])[0].error or "")


def test_a_model_without_numbers_is_noticed() -> None:
    forced = Forced([Scored(0, [1], [2, 3])])
    with pytest.raises(FloatingPointError, match="not numbers"):
        force(torch.full((1, 10), float("nan")), [forced])


def test_an_engine_that_cannot_score_says_so() -> None:
    from harness.engines.mii.engine import MiiEngine

    chosen = settings()
    mii = MiiEngine(replace(chosen, engine=replace(chosen.engine, name="mii")))
    with pytest.raises(UserError, match=r"^engine: mii cannot score given tokens; use engine=fastgen"):
        mii.score([])


# --- ds_inference's other ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 200])
def test_the_fixed_cache_of_a_cuda_graph_is_what_is_scored(width: int) -> None:
    engine = engine_of("ds_inference", batch_size=4)
    assert isinstance(engine, DsInferenceEngine)
    engine.batches.graphed = StaticCache(4, width, "cpu", fixed=True)
    wanted = items(10, seed=5)
    model = loading.load_model(engine.settings.source, dtype=torch.float32)
    assert differences(model, wanted, scored(engine, wanted)).max() < 1e-5


def test_injected_layers_are_what_is_scored() -> None:
    engine = engine_of("ds_inference", batch_size=4, batch_tokens=4 * 180)
    assert isinstance(engine, DsInferenceEngine)
    layers = LayersThatRemember(4, damage=0.3)
    engine.batches.injected = InjectedBatch(layers, 4, "cpu", torch.float32)
    wanted = items(14, seed=11)
    found = scored(engine, wanted)
    whole = loading.load_model(engine.settings.source, dtype=torch.float32)
    assert differences(whole, wanted, found).mean() > 0.001
    layers.model.set_attn_implementation("eager")
    assert differences(layers.model, wanted, found).max() < 1e-5
    found = scored(engine, [Scored(0, [5] * 170, [6] * 11)])
    assert "180 columns of a row" in (found[0].error or "")


# --- the kernels of fastgen -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(demo_model: Path) -> list[Scored]:
    """Real text of several languages, in its own tokens: random ones would make rounding seem large."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompts = [json.loads(line)["prompt"] for line in SAMPLE.read_text().splitlines()]
    found = [tokenizer(prompt).input_ids for prompt in prompts]
    cut = [(ids, 5 + 7 * number) for number, ids in enumerate(ids for ids in found if len(ids) > 120)]
    return [Scored(number, ids[:place], ids[place : place + 12]) for number, (ids, place) in enumerate(cut[:12])]


@pytest.fixture(scope="module")
def reference_scores(demo_model: Path, texts: list[Scored]) -> Callable[[str], Tensor]:
    """Returns Hugging Face's log-probabilities of all target tokens in a type, each computed once it is asked for."""

    @cache
    def scores(dtype: str) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
        return torch.cat([expected(model.to(getattr(torch, dtype)), item)[0] for item in texts])

    return scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        pytest.param("float32", Kernels.native, marks=needs_native),
        pytest.param("bfloat16", Kernels.native, marks=needs_native),
        ("float32", Kernels.torch),
        ("bfloat16", Kernels.torch),
    ],
)
def test_real_text_on_the_demo_model(
    demo_model: Path, texts: list[Scored], reference_scores: Callable[[str], Tensor], dtype: str, kernels: Kernels
) -> None:
    """In float32 to the fourth digit; in bfloat16 no farther off than Hugging Face's own bfloat16, or half again."""
    engine = FastGenEngine(settings_of(demo_model, dtype=dtype, kernels=kernels, token_budget=96, max_sequences=16))
    engine.load()
    assert engine.kernels == kernels.value
    exact = reference_scores("float32")
    for prefill in (False, True):
        found = scored(engine, texts, prefill)
        ours = torch.tensor([logprob for item in texts for logprob in found[item.index].logprobs])
        assert len(ours) == len(exact) == 12 * 12
        off = (ours - exact).abs()
        if dtype == "float32":
            assert off.max() < 2e-4
        else:
            theirs = (reference_scores("bfloat16") - exact).abs()
            assert 0 < off.mean() < 1.5 * theirs.mean()
            assert off.max() < 2 * theirs.max()


def test_deepspeeds_kernels_and_its_fp6_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of DeepSpeed's engine but the CUDA kernels; six bits cost what rounding the weights costs."""
    from deepspeed.inference.v2.modules.implementations.linear import fp_quantize

    emulate(monkeypatch.setattr)
    monkeypatch.setitem(sys.modules, "qtorch", types.ModuleType("qtorch"))
    monkeypatch.setitem(sys.modules, "qtorch.quant", types.SimpleNamespace(float_quantize=float_quantize))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=8))
    directory = test_deepspeed_runner.save(tmp_path, dtype=torch.bfloat16)
    wanted = items(10, vocab=320)
    found = {}
    for quantization in (None, "wf6af16"):
        chosen = test_deepspeed_runner.settings(directory, quantization=quantization)
        engine = FastGenEngine(chosen)
        engine.runner, engine.total_blocks = test_deepspeed_runner.loaded(chosen), 64
        found[quantization] = scored(engine, wanted)
        with pytest.raises(UserError, match="deepspeed kernels gives no logits within a prompt"):
            scored(engine, wanted, prefill=True)
    model = loading.load_model(engine.settings.source, dtype=torch.float32)
    rounding = differences(model, wanted, found[None]).max()
    assert rounding < 0.05
    assert differences(model, wanted, found["wf6af16"]).mean() > 0.1
    for name, weight in model.named_parameters():
        if "proj" in name:
            values, scales = fp_quantize(weight.data.half())
            weight.data = values.float() * scales.float()
    assert differences(model, wanted, found["wf6af16"]).max() < 0.05
