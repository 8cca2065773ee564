"""The engines with stop strings and stop ids: ids, ends and texts are those of Hugging Face's ``generate``."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mii
from support.engines import LayersThatRemember, engine_for, generate
from support.engines import settings_of as settings_for
from support.machine import needs_native
from support.models import save_model
from support.tokenizer_kinds import TEXT, tokenizer

from harness.basics.errors import UserError
from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import Engine, EngineSettings
from harness.engines.baseline.config import BaselineConfig
from harness.engines.baseline.engine import BaselineEngine
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.models import loading
from harness.models.ends import Ends
from harness.models.reference import Reference
from harness.workload.records import Completion, Request

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # the smallest that all kernels have
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 9,
    "pad_token_id": 0,
}
KNOWN = tokenizer("byte_level")
no_gpu = mii.no_gpu


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("stops") / "tiny", "llama", torch.float32, **SIZES)
    KNOWN.save_pretrained(made)
    return made


@cache
def jobs() -> tuple[Request, ...]:
    """Returns prompts that are pieces of a text, whose ends stop strings may begin in."""
    rng = random.Random(0)
    found = []
    for index in range(24):
        begin, length = rng.randrange(60), rng.choice([3, 8, 20, 50])
        found.append(Request(index, (TEXT + TEXT)[begin : begin + length], rng.choice([1, 2, 9, 30, 40])))
    return tuple(found)


def ended(directory: Path, generation: GenerationConfig) -> dict[int, list[int]]:
    """Returns what ``generate`` itself makes of the jobs, told of stop strings and ids in its own words."""
    model: Any = loading.load_model(settings_for(directory).source, dtype=torch.float32)
    ids = [9, *generation.stop_token_ids] if generation.stop is Stop.eos else None
    more = {"stop_strings": generation.stop_strings, "tokenizer": KNOWN} if generation.stop_strings else {}
    found = {}
    for job in jobs():
        prompt = KNOWN(job.prompt, return_tensors="pt").input_ids
        how = {"max_new_tokens": job.output_len, "do_sample": False, "eos_token_id": ids, "pad_token_id": 0}
        with torch.inference_mode():
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how, **more)
        found[job.index] = output[0, prompt.shape[1] :].tolist()
    return found


@pytest.fixture(scope="module")
def free(directory: Path) -> dict[int, list[int]]:
    return ended(directory, GenerationConfig(stop=Stop.length))


@pytest.fixture(scope="module")
def asked(free: dict[int, list[int]]) -> GenerationConfig:
    """Returns stop strings that end some requests: split over tokens, in a token, at the end of prompts; and ids."""
    whole = [max(KNOWN.decode(ids).split("\ufffd"), key=len) for ids in free.values()]
    longest = sorted(whole, key=len)[-6:]
    strings = {text[len(text) // 2 :][: 2 + place % 2] for place, text in enumerate(longest)}
    over = [job.prompt[-1] + KNOWN.decode(free[job.index][:1]) for job in jobs()]
    strings.add(next(string for string in over if "\ufffd" not in string))
    return GenerationConfig(stop_strings=sorted(strings), stop_token_ids=[free[index][-1] for index in (5, 11)])


@pytest.fixture(scope="module")
def expected(directory: Path, asked: GenerationConfig, free: dict[int, list[int]]) -> dict[int, list[int]]:
    found = ended(directory, asked)
    assert sum(found[index] != ids and found[index][-1] != 9 for index, ids in free.items()) >= 6
    return found


def told(directory: Path, asked: GenerationConfig, engine: Any = None, **keys: Any) -> EngineSettings:
    chosen = dataclasses.replace(settings_for(directory, **keys), generation=asked)
    return chosen if engine is None else dataclasses.replace(chosen, engine=engine)


def check(
    engine: Engine, found: dict[int, Completion], expected: dict[int, list[int]], asked: GenerationConfig
) -> None:
    """Compares an engine's completions with ``generate``'s ids; their texts have no stop string."""
    assert {index: one.token_ids for index, one in found.items()} == expected
    lengths = {job.index: job.output_len for job in jobs()}
    for index, one in found.items():
        last, whole = one.token_ids[-1], KNOWN.decode(one.token_ids, skip_special_tokens=True)
        assert one.output_tokens == len(one.token_ids)
        assert not any(string in one.text for string in asked.stop_strings)
        assert (one.finish_reason == "eos") == (last == 9)
        if one.output_tokens < (lengths[index] or 0):
            assert one.finish_reason in ("eos", "stop")
        if one.finish_reason == "length":
            assert one.text == whole and last not in asked.stop_token_ids
        if one.finish_reason == "stop":
            assert last in asked.stop_token_ids or len(one.text) < len(whole)
    assert {one.finish_reason for one in found.values()} >= {"stop", "length"}
    assert engine.ends.stop_ids == set(asked.stop_token_ids)


@pytest.mark.parametrize("blocks", [7, 200])
@pytest.mark.parametrize(
    "kernels", [Kernels.torch, pytest.param(Kernels.native, marks=needs_native)], ids=lambda kernels: kernels.value
)
def test_fastgen(
    directory: Path, asked: GenerationConfig, expected: dict[int, list[int]], kernels: Kernels, blocks: int
) -> None:
    bytes_of_block = 2 * 2 * 16 * 2 * 64 * 4
    sizes = {"token_budget": 24, "max_sequences": 8, "kv_block_size": 16, "kv_memory": blocks * bytes_of_block}
    engine = FastGenEngine(told(directory, asked, kernels=kernels, **sizes))
    engine.load()
    check(engine, generate(engine, list(jobs())), expected, asked)
    assert engine.statistics.preemptions is not None
    assert (engine.statistics.preemptions > 0) == (blocks == 7)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_triton_kernels(
    directory: Path, asked: GenerationConfig, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    engine = FastGenEngine(told(directory, asked, kernels=Kernels.triton, token_budget=24, max_sequences=4))
    engine.load()
    short = [job for job in jobs() if len(expected[job.index]) <= 9]
    stopped = [job for job in short if len(expected[job.index]) < (job.output_len or 0)][:2]
    chosen = [*stopped, *[job for job in short if job not in stopped][:2]]
    found = generate(engine, chosen)
    assert {index: one.token_ids for index, one in found.items()} == {job.index: expected[job.index] for job in chosen}
    assert {found[job.index].finish_reason for job in stopped} <= {"stop", "eos"} and stopped


def test_baseline_and_the_reference(directory: Path, asked: GenerationConfig, expected: dict[int, list[int]]) -> None:
    engine = BaselineEngine(told(directory, asked, BaselineConfig()))
    engine.load()
    check(engine, generate(engine, list(jobs())), expected, asked)
    reference = Reference(engine.settings.source, "float32", asked, "cpu")
    for job in jobs()[:8]:
        assert reference.generate(KNOWN(job.prompt).input_ids, job.output_len or 0) == expected[job.index]


def test_ds_inference(directory: Path, asked: GenerationConfig, expected: dict[int, list[int]]) -> None:
    engine = DsInferenceEngine(told(directory, asked, DsInferenceConfig(batch_size=5)))
    engine.load()
    check(engine, generate(engine, list(jobs())), expected, asked)


def test_rows_of_injected_layers_end_too() -> None:
    """Their stand-in has dummy weights and no tokenizer: stop ids, and stop strings of made-up bytes."""
    engine = engine_for(batch_size=4, batch_tokens=4 * 190)
    engine.batches.injected = InjectedBatch(LayersThatRemember(4), 4, "cpu", torch.float32)
    rng = random.Random(3)
    asked = [Request(i, "", 12, prompt_ids=tuple(rng.randrange(3, 300) for _ in range(9))) for i in range(8)]
    free = {index: one.token_ids for index, one in generate(engine, asked).items()}
    stop = free[0][4]
    engine.ends = engine.batches.ends = Ends(frozenset(), frozenset([stop]))
    for index, one in generate(engine, asked).items():
        ids = free[index]
        assert one.token_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)
        assert one.finish_reason == ("stop" if stop in ids else "length")


@pytest.mark.usefixtures("no_gpu")
def test_mii_ends_at_stop_ids() -> None:
    pytest.importorskip("mii", reason="DeepSpeed-MII is not installed")
    engine = mii.engine_on_cpu(mii.settings_of())
    asked = [Request(index, "", 12, prompt_ids=tuple(range(index + 3, index + 9))) for index in range(6)]
    free = [mii.counted(job) for job in asked]
    eos, stop = free[0][3], free[1][5]
    engine.ends = Ends(frozenset([eos]), frozenset([stop]))
    found = generate(engine, asked)
    for job in asked:
        ids = mii.counted(job, frozenset([eos, stop]))
        assert found[job.index].token_ids == ids
        assert found[job.index].finish_reason == {eos: "eos", stop: "stop"}.get(ids[-1], "length")
    assert {one.finish_reason for one in found.values()} >= {"eos", "stop"}


def test_a_stop_string_that_can_never_come_is_refused_before_the_weights(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", torch.float32, **SIZES)
    tokenizer("words").save_pretrained(tmp_path)
    engine = BaselineEngine(told(tmp_path, GenerationConfig(stop_strings=["\u0416"]), BaselineConfig()))
    with pytest.raises(UserError, match=r"^generation\.stop_strings: '\u0416' has characters that no token"):
        engine.load()
