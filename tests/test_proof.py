"""Engines that prove themselves on the model, and those that cannot: faults planted into passes, weights and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import LayersThatRemember, generate, hugging_face, requests, settings, settings_of
from support.machine import needs_native, skip_unless_deepspeed_takes
from support.models import SIZES, save_model
from support.runs import RANDOM, Run, launched
from support.runs import TINY as SMALL

from harness.basics.cache import cache_root
from harness.basics.errors import UserError
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners import torch_runner
from harness.engines.fastgen.runners.native_runner import NativeRunner
from harness.engines.fastgen.runners.torch_runner import TorchRunner
from harness.engines.proof import cache, proof, shortened

pytestmark = pytest.mark.usefixtures("one_thread", "empty_cache")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has an empty cache, but for the native kernels: they take seconds to compile."""
    (tmp_path / "cache").mkdir()
    (cache_root() / "native").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache" / "native").symlink_to(cache_root() / "native")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


def static(**engine: Any) -> DsInferenceEngine:
    return DsInferenceEngine(replace(settings(), engine=DsInferenceConfig(**engine)))


# --- engines that are right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [lambda: FastGenEngine(settings()), static], ids=["fastgen", "ds_inference"])
def test_what_was_compared_is_told_and_kept(make: Callable[[], Any], dtype: str) -> None:
    first = make()
    if isinstance(first, DsInferenceEngine):
        skip_unless_deepspeed_takes(dtype)
    first.settings = replace(first.settings, dtype=dtype)
    engine = proof.load(type(first)(first.settings))
    found = engine.proof
    assert found is not None
    assert (found["requests"], found["layers"], engine.notes) == (len(proof.LENGTHS), None, [])
    assert 0 < found["largest_distance"] <= found["bound"]
    assert (found["bound"] == proof.EXACT) == (dtype == "float32")
    if dtype == "float32":
        assert found["largest_distance"] < proof.EXACT / 10
    again = proof.load(type(first)(first.settings))
    assert again.proof == found | {"cached": True, "seconds": 0.0}


def test_an_engine_that_has_proven_itself_gives_hugging_face_ids() -> None:
    engine, jobs = proof.load(FastGenEngine(settings())), requests(6)
    found = {index: completion.token_ids for index, completion in generate(engine, jobs).items()}
    assert found == hugging_face(engine.settings.source, jobs)


def test_prompts_are_split_together_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[tuple[int, int, int, bool]]] = []
    whole = TorchRunner.logits

    def spy(runner: TorchRunner, batch: Any, rows: Any = None) -> Any:
        passes.append([(sequence.uid, *what) for sequence, *what in batch.chunks])
        return whole(runner, batch, rows)

    monkeypatch.setattr(TorchRunner, "logits", spy)
    proof.load(FastGenEngine(settings()))
    assert any(start > 0 and length > 1 for chunks in passes for _, start, length, _ in chunks), "no prompt was split"
    assert any(len(chunks) > 2 for chunks in passes), "no sequences were together"
    assert sum(length == 1 and start > 0 for chunks in passes for _, start, length, _ in chunks) >= 3 * 5
    assert any({length > 1 for _, _, length, _ in chunks} == {True, False} for chunks in passes)


def test_another_weight_setting_or_code_is_another_proof(tmp_path: Path) -> None:
    one = settings_of(save_model(tmp_path / "one", "llama", torch.float32, **SIZES))
    other = settings_of(save_model(tmp_path / "other", "llama", torch.float32, sharp=1.1, **SIZES))
    keys = {
        cache.key(each, kernels)
        for each in (one, other, replace(one, dtype="bfloat16"), replace(one, max_context=64))
        for kernels in ("torch", "native")
    }
    assert len(keys) == 8 and None not in keys
    smaller = replace(one, engine=replace(one.engine, token_budget=64, max_sequences=8))
    assert cache.key(smaller, "torch") == cache.key(one, "torch")
    assert cache.key(one, "native", {"instruction_set": "avx2"}) not in keys


# --- engines that are wrong -----------------------------------------------------------------------------------------


def positions_before(plan: Any) -> Any:
    plan.write_offset = (plan.write_offset + 1) % 64
    return plan


def without_the_last_key(plan: Any) -> Any:
    for prompt in plan.prompts:
        if prompt.mask is not None:  # a continued prompt's chunk
            prompt.mask[-1, -2] = False
    return plan


def swapped(plan: Any) -> Any:
    if plan.decodes is not None:
        plan.decodes.rows = plan.decodes.rows.flip(0)
    return plan


@pytest.mark.parametrize("fault", [positions_before, without_the_last_key, swapped])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_in_the_passes_is_found(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], dtype: str
) -> None:
    if (fault, dtype) == (without_the_last_key, "bfloat16"):
        pytest.skip("one key of many is within the rounding of 16 bits: float32 is where that shows")
    whole = torch_runner.build_plan
    monkeypatch.setattr(torch_runner, "build_plan", lambda *arguments: fault(whole(*arguments)))
    with pytest.raises(proof.Differs) as caught:
        proof.load(FastGenEngine(replace(settings(), dtype=dtype)))
    line = str(caught.value)
    assert line.startswith("model: engine=fastgen does not compute it as Hugging Face does: after a prompt of ")
    assert line.endswith("; use engine=baseline") and "of their spread from Hugging Face's (bound " in line
    assert not list(cache.root().glob("*.json"))


@needs_native
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_kernels_that_compute_something_else_are_refused_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    whole = NativeRunner._layer

    def without_a_norm(runner: NativeRunner, layer: Any) -> Any:
        getattr(layer, norm).weight.zero_()
        return whole(runner, layer)

    monkeypatch.setattr(NativeRunner, "_layer", without_a_norm)
    chosen = settings_of(save_model(tmp_path, "llama", torch.float32, **SIZES))
    with pytest.raises(UserError, match=r"^engine\.kernels: native: after a prompt .*; use engine\.kernels=torch$"):
        proof.load(FastGenEngine(replace(chosen, engine=replace(chosen.engine, kernels=Kernels.native))))
    engine = proof.load(FastGenEngine(replace(chosen, engine=replace(chosen.engine, kernels=Kernels.auto))))
    assert engine.kernels == "torch" and engine.proof is not None
    (note,) = engine.notes
    assert note.startswith("engine.kernels=auto took torch, not native: after a prompt of ")


@needs_native
@pytest.mark.parametrize("weight", ["model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_numbers_are_found(tmp_path: Path, weight: str) -> None:
    """All logits of every token, or one logit of each."""
    save_model(tmp_path, "llama", torch.float32, **SIZES)
    weights = load_file(tmp_path / "model.safetensors")
    weights[weight][7] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model: its logits are not numbers; check the weights"):
        proof.load(FastGenEngine(settings_of(tmp_path)))


@pytest.mark.parametrize(("damage", "why"), [(0.0, None), (0.5, "after a prompt of"), (float("nan"), "not numbers")])
def test_injected_layers_are_what_is_compared(monkeypatch: pytest.MonkeyPatch, damage: float, why: str | None) -> None:
    whole = DsInferenceEngine.load

    def injected(engine: DsInferenceEngine) -> None:
        asked, engine.settings = engine.settings, static(batch_size=4).settings
        whole(engine)
        engine.settings = asked
        engine.batches.injected = InjectedBatch(LayersThatRemember(4, damage), 4, "cpu", torch.float32)

    monkeypatch.setattr(DsInferenceEngine, "load", injected)
    engine = static(batch_size=4, batch_tokens=4 * 180, kernel_inject=True)
    if why is None:
        proof.load(engine)
        return
    line = (
        rf"^engine\.kernel_inject: true: DeepSpeed's injected kernels do not .*{why}.*; use engine.kernel_inject=false"
    )
    with pytest.raises(proof.Differs, match=line):
        proof.load(engine)


# --- models that are too large, and probes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dummy", "directory"])
def test_a_model_that_does_not_fit_twice_is_compared_by_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shortened, "CPU_BYTES", 0)
    chosen = settings()
    if kind == "directory":
        chosen = settings_of(
            save_model(tmp_path / "model", "qwen3", torch.float32, **{**SIZES, "num_hidden_layers": 4})
        )
    loaded: list[int] = []
    whole = torch_runner.TorchRunner.load

    def spy(runner: TorchRunner) -> None:
        whole(runner)
        loaded.append(len(runner.kv_shapes))

    monkeypatch.setattr(TorchRunner, "load", spy)
    engine = proof.load(FastGenEngine(replace(chosen, engine=replace(chosen.engine, kernels=Kernels.torch))))
    layers = 3 if kind == "dummy" else 4
    assert engine.proof is not None and engine.proof["layers"] == 2
    assert loaded == [2, layers] and engine.proof["largest_distance"] < proof.EXACT
    left = {path.suffix for path in cache.root().iterdir()}
    assert left == {".json"}, "the checkpoint of the first layers was left behind"


def test_probes_reach_beyond_special_positions_and_stay_within_the_context() -> None:
    config = {"sliding_window": 100, "attention_chunk_size": 40, "rope_parameters": {"rope_type": "dynamic"}}
    config["max_position_embeddings"] = 200
    assert proof.special_positions(config, 150) == [40, 100]
    assert proof.special_positions(config, None) == [40, 100, 200]
    items = proof.probes(50, [40, 100], 120)
    assert [len(item.context_ids) for item in items] == [1, 6, 19, 38, 42, 50, 83, 98, 102]
    assert all(0 <= token < 50 for item in items for token in (*item.context_ids, *item.target_ids))
    assert [len(item.context_ids) for item in proof.probes(300, [], 30)] == [1, 6, 19, 26]


def test_a_cache_without_room_for_all_of_them_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 2 * 3 * 2 * 16 * 16 * 4
    engine = proof.load(FastGenEngine(settings(kv_block_size=16, kv_memory=3 * block)))
    assert engine.proof is not None and engine.proof["requests"] == 3 and engine.notes == []
    monkeypatch.setattr(proof, "LENGTHS", (60,))
    engine = proof.load(FastGenEngine(settings(kv_block_size=16, kv_memory=block, max_sequences=7)))
    assert engine.proof is not None and engine.proof["requests"] == 0  # a part of a proof is not kept as one
    assert engine.notes == ["the engine was not compared with Hugging Face's model: there is no room for a request"]
    assert not list(cache.root().glob("*.json"))


# --- several ranks, and a whole run ---------------------------------------------------------------------------------

RANKS = """
import json, os, sys
import torch
sys.path[0] = os.getcwd()
sys.path.insert(0, os.path.join(os.getcwd(), "tests"))
from support.engines import team_of_two
fault, place = sys.argv[-2:]
team_of_two(fault, place)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "damage"])
def test_two_ranks_prove_themselves_together(tmp_path: Path, fault: str) -> None:
    first, second = launched(tmp_path, RANKS, 2, fault, HARNESS_CACHE=str(tmp_path / "cache"))
    if fault == "none":
        assert first["requests"] == 5 and first["largest_distance"] < 1e-4
        assert second["cached"] is True
    else:
        assert first == second
        assert first.startswith("parallel.tp: 2: engine=fastgen does not compute this model: after a prompt of")


@pytest.mark.slow
def test_a_run_records_its_proof(harness: Callable[..., Run], tmp_path: Path, demo_model: Path) -> None:
    words = [f"model.path={demo_model}", "dataset.num_samples=2", "generation.max_output_len=4", "model.dtype=float32"]
    run = harness(*words, HARNESS_CACHE=str(tmp_path / "cache"))
    assert run.status == 0, run.stderr
    found = run.record["proof"]
    assert found["requests"] == 5 and found["largest_distance"] < proof.EXACT and found["seconds"] > 0
    assert "comparing" in run.stdout and "agree with Hugging Face's model" in " ".join(run.stdout.split())


@pytest.mark.slow
def test_a_run_of_what_is_computed_wrongly_is_refused(harness: Callable[..., Run], tmp_path: Path) -> None:
    """The sinks of its attention are weights that no config names."""
    words = [*SMALL, *RANDOM, "dataset.input_len=8", "dataset.output_len=4", "dataset.num_samples=2"]
    words += ["model.architecture.model_type=gpt_oss", "model.max_context=128"]
    run = harness(*words)
    assert run.status == 2
    assert (run.row["status"], run.row["total_tokens"]) == ("invalid", "0")
    line = "gpt_oss models have attention that engine=fastgen does not compute (s_aux); use engine=baseline"
    assert line in run.stderr
    run = harness(*words, "engine=baseline", results=tmp_path / "advice")
    assert run.status == 0, run.stderr
