"""The acceptance's matrix: its checkpoints, requests, choices and goals, and what is said of a scaled figure."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import ROOT, Run, ran

sys.path.insert(0, str(ROOT / "launch"))

import profile_pass
from acceptance.findings import Finding, Outcome
from acceptance.harness_run import HarnessRun
from acceptance.matrix import figures, forecast, goals, requests, scaled, tokenizers, weights
from acceptance.matrix.cases import ANY, cases
from acceptance.matrix.course import Course
from acceptance.matrix.models import Models
from acceptance.stage import Stage

from harness.basics.errors import UserError
from harness.config.compose import compose, to_config
from harness.config.schema import HardwareConfig, ModelConfig
from harness.costs.shape import ModelShape
from harness.engines import catalogue
from harness.engines.shared import deepspeed_ops
from harness.models import locate, made_up

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = weights.architecture("llama2_7b", **TINY, num_key_value_heads=2)
H100: HardwareConfig = to_config(compose(["hardware=h100_80g"])).hardware if catalogue.register() is None else None


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    said = tokenizers.make(directory, 32_000)
    assert "32,000" in said
    return directory


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "SHARD_BYTES", 3 << 20)
        done = weights.write(directory, SIZES, "bfloat16", "cpu", tokenizer)
    assert done.shards == len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> HarnessRun:
    """Returns a run of FastGen, as a stage has it."""
    directory = tmp_path_factory.mktemp("measured")
    job = [*requests.find(directory, tokenizer, 8, cap=12).overrides(8), "generation.stop=length", *ANY]
    run = ran(directory / "results", f"model.path={checkpoint}", "model.dtype=float32", *job)
    assert run.status == 0, run.stderr
    place = directory / "results" / run.row["run_id"]
    return HarnessRun(0, 9.0, False, "", "", row=run.row, record=run.record, directory=place)


def test_a_checkpoint_is_one_that_transformers_reads_with_the_weights_of_dummy(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype is torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
    state = model.state_dict()
    assert state["lm_head.weight"].shape == (32_000, 64) and len(state) == 2 * 9 + 3
    assert state["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"):
        drawn = torch.empty_like(state[name])
        made_up.draw(name, drawn, tuple(drawn.shape))
        assert torch.equal(drawn, state[name])
    text = "Hello 世界, ¿qué tal?"
    known = AutoTokenizer.from_pretrained(checkpoint)
    ids = known(text).input_ids
    assert len(known) == 32_000 and max(ids) < 32_000 and known.decode(ids) == text
    source = locate.locate(ModelConfig(name="llama2_7b", path=str(checkpoint)))
    assert (source.kind, source.tokenizer) == ("directory", str(checkpoint))


def test_a_checkpoint_is_written_once_and_anew_where_it_was_interrupted(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = [path.stat().st_mtime_ns for path in sorted(checkpoint.iterdir())]
    weights.write(checkpoint, SIZES, "bfloat16", "cpu", tokenizer)
    assert [path.stat().st_mtime_ns for path in sorted(checkpoint.iterdir())] == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model-00001-of-00009.safetensors").write_bytes(b"torn")
    done = weights.write(tmp_path / "half", SIZES, "bfloat16", "cpu", tokenizer)
    assert weights.written(tmp_path / "half") == done and done.size == 2 * ModelShape.of(SIZES, "bfloat16").total
    assert not (tmp_path / "half" / "model-00001-of-00009.safetensors").exists()


def test_a_disk_without_room_is_told_in_a_line(tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"GiB left, the checkpoint takes 0\.0 GiB"):
        weights.write(tmp_path / "tiny", SIZES, "bfloat16", "cpu", tokenizer)


def test_the_7b_and_13b_checkpoints_are_of_real_width() -> None:
    for option, billions in (("llama2_7b", 6.738), ("llama2_13b", 13.016), ("llama2_70b", 68.977)):
        assert ModelShape.of(weights.architecture(option), "bfloat16").total / 1e9 == pytest.approx(billions, abs=1e-3)


def test_made_requests_are_counted_by_the_tokenizer_and_of_the_published_shape(
    tokenizer: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv(requests.VARIABLE, raising=False)
    found = requests.find(tmp_path, tokenizer, 300)
    lines = json.loads(found.path.read_text())
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert all(len(known.encode(prompt).ids) == count for prompt, count, _ in lines[:50])
    lengths = found.lengths(300, 4096)
    prompts, outputs = (sorted(one[place] for one in lengths.items) for place in (0, 1))
    assert found.available == len(prompts) == 300
    assert 80 < prompts[150] < 150 and prompts[-1] <= 1100 and 110 < outputs[150] < 210 and outputs[-1] <= 1024
    config = to_config(compose(list(requests.Requests(found.path, "", cap=8).overrides(7))))
    assert (config.dataset.num_samples, config.generation.max_output_len) == (7, 8)
    monkeypatch.setenv(requests.VARIABLE, str(found.path))
    assert requests.find(tmp_path / "other", tokenizer, 5).path == found.path


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_case_is_a_config_and_goes_on_from_an_earlier_one(rehearse: bool) -> None:
    seen: set[str] = set()
    for case in cases():
        assert case.name not in seen and (case.like is None or case.like in seen)
        seen.add(case.name)
    for words in sorted({case.words(rehearse) for case in cases()}):
        to_config(compose(["model=llama2_7b", *words, "parallel=single"]))
    assert {goals.OURS, goals.MII, goals.BASELINE, goals.AGAIN} <= seen


def test_as_many_requests_as_the_time_is_enough_for() -> None:
    assert forecast.choose(1000, 50.0, lambda count: count / 20) == (1000, 50.0)
    assert forecast.choose(1000, 49.0, lambda count: count / 20) == (500, 25.0)
    assert forecast.choose(1000, 1.0, lambda count: count / 4) is None
    assert forecast.choose(2, 10.0, lambda count: float(count)) == (2, 2.0)
    assert forecast.choose(1000, 1.0, None) == (1000, None)
    assert forecast.fewer(1000, 400, 100.0, 75.0) == 150
    assert forecast.fewer(1000, 8, 100.0, 75.0) is None
    assert forecast.fewer(100, 0, 0.0, 75.0) is None


def test_predictions_order_the_engines_as_their_launches_do(tokenizer: Path, tmp_path: Path) -> None:
    found = requests.find(tmp_path, tokenizer, 64)
    shape = ModelShape.of(weights.architecture("llama2_7b"), "bfloat16")

    def predicted(kind: forecast.Kind, count: int = 64) -> float:
        return forecast.seconds(kind, found.lengths(count, 4096), shape, H100, "bfloat16")

    order = (forecast.TRITON, forecast.DEEPSPEED, forecast.TORCH, forecast.ONE_BY_ONE)
    took = [predicted(kind) for kind in order]
    assert took == sorted(took) and predicted(forecast.TRITON, 16) < took[0]
    # The committee's loop reads all weights for each token, and waits for each launch besides.
    tokens = found.lengths(64, 4096).output_tokens
    assert took[-1] > tokens * (shape.matrix_bytes / 3.35e12 + 32 * forecast.ONE_BY_ONE.layer_s)


def finding(name: str, outcome: Outcome = Outcome.measured, detail: str = "", **values: Any) -> dict[str, Finding]:
    return {name: Finding(name, outcome, detail, values, 1.0)}


def judged(found: dict[str, Finding], demo: list[Finding] | None = None) -> dict[str, tuple[str, float | None, str]]:
    return {goal.name: (goal.verdict, goal.value, goal.on) for goal in goals.goals(found, demo or [])}


def test_goals_are_met_or_not_or_not_measured() -> None:
    shares = {"share_of_measured_rate": 0.55, "device_busy_share": 0.949}
    found = finding(goals.OURS, total_tokens_per_s=30_000.0, requests=1000, **shares) | finding(
        goals.MII, total_tokens_per_s=20_000.0, requests=1000
    )
    found |= finding(goals.BASELINE, total_tokens_per_s=2_001.0, requests=20)
    found |= finding(goals.AGAIN, same_ids_share=0.999)
    passed = next(iter(finding("demo bfloat16 fastgen triton", Outcome.passed).values()))
    verdicts = judged(found, [passed])
    assert verdicts["fastgen against MII"][:2] == (goals.MET, 1.5)
    assert verdicts["fastgen against the committee's loop"][0] == goals.NOT_MET
    assert "1000 against 20 requests" in verdicts["fastgen against the committee's loop"][2]
    assert verdicts["share of the measured bf16 matrix rate"][0] == goals.MET
    found[goals.OURS].figures[goals.MOST] = 0.32
    assert "by the roofline these requests allow 0.32" in judged(found)["share of the measured bf16 matrix rate"][2]
    assert verdicts["device busy"][0] == goals.NOT_MET
    assert verdicts["same ids twice"][0] == goals.NOT_MET
    assert verdicts["demo model's ids judged right"][0] == goals.MET
    failed = next(iter(finding("demo float16 fastgen triton", Outcome.failed).values()))
    assert judged(found, [passed, failed])["demo model's ids judged right"][:2] == (goals.NOT_MET, 0.5)


def test_what_was_not_measured_is_no_figure() -> None:
    found = finding(goals.OURS, Outcome.failed, "died", total_tokens_per_s=1.0)
    found |= finding(goals.MII, Outcome.refused, "no")
    verdicts = judged(found)
    assert {verdict for verdict, _, _ in verdicts.values()} == {goals.NOT_MEASURED}
    assert all(value is None for _, value, _ in verdicts.values())
    assert verdicts["device busy"][2] == f"{goals.OURS}: failed: died"
    assert verdicts["same ids twice"][2] == f"{goals.AGAIN} was not run"
    half = finding(goals.OURS, total_tokens_per_s=1.0)
    assert judged(half)["device busy"] == (goals.NOT_MEASURED, None, f"{goals.OURS} has no device_busy_share")
    assert "value" not in goals.figures(goals.goals(half, [])[3])


def test_figures_of_a_run_say_how_far_it_is_from_the_bound(measured: HarnessRun) -> None:
    assert measured.row is not None
    peak = measured.record["hardware_measured"]["peak_flops"]
    hardware = HardwareConfig(name="cpu", peak_flops={"float32": peak}, memory_bandwidth=1e12)
    found = figures.of_run(measured, SIZES, hardware, 2 * peak)
    assert found["total_tokens_per_s"] == float(measured.row["total_tokens_per_s"])
    assert float(found["share_of_bound"]) > 0 and found["run_s"] == 9.0
    # Of so small a model on so wide a memory, products alone are the bound, and both count the same of them.
    assert found["share_of_bound"] == pytest.approx(float(found["model_flops_utilisation"]), rel=0.02)
    assert found["share_of_measured_rate"] == pytest.approx(float(found["model_flops_utilisation"]) / 2, rel=1e-3)
    assert found["most_share_of_measured_rate"] == pytest.approx(0.5, rel=0.02)
    assert not {"bound_tokens_per_s", "share_of_measured_rate"} & figures.of_run(measured, SIZES, None, None).keys()


def test_a_card_that_no_option_names_has_what_was_measured() -> None:
    known = figures.of_device("NVIDIA H100 80GB HBM3", 1, 1.0, 1.0)
    assert known is not None and known.name == "h100_80g"
    assert figures.of_device("Some card", 1, None, 1.0) is None
    found = figures.of_device("Some card", 80, 8.3e14, 3e12)
    assert found is not None and found.peak_flops["bfloat16"] == pytest.approx(1e15)


def test_layers_that_fit_leave_room_for_the_cache() -> None:
    whole = weights.architecture("llama2_70b")
    layers = scaled.layers_that_fit(whole, "bfloat16", 80e9)
    shape = ModelShape.of(whole | {"num_hidden_layers": layers}, "bfloat16")
    assert 0.65 * 80e9 < shape.matrix_bytes + shape.other_bytes <= 0.7 * 80e9
    assert scaled.layers_that_fit(whole, "bfloat16", 1e9) == 1 and scaled.layers_that_fit(whole, "bfloat16", 1e12) == 80


def test_a_scaled_figure_says_that_it_is_simulated(
    measured: HarnessRun, checkpoint: Path, harness: Callable[..., Run], tmp_path: Path
) -> None:
    assert measured.directory is not None
    run = scaled.Layers(measured.directory, SIZES | {"num_hidden_layers": 6})
    by_layer = run.by_layer()
    assert by_layer["layers"] == 2 and float(by_layer["decode_pass_s_per_layer"]) > 0
    assert float(by_layer["mixed_pass_tokens"]) > float(by_layer["decode_pass_tokens"])
    assert "fit_error_of_run" in run.write_fit(None, tmp_path)
    sizes = [f"model.architecture.{key}={SIZES[key]}" for key in (*TINY, "num_key_value_heads")]
    sizes[2] = "model.architecture.num_hidden_layers=6"
    model = ["model=llama2_7b", "model.weights=dummy", "model.dtype=float32", f"model.tokenizer={checkpoint}", *sizes]
    job = ["dataset.num_samples=8", "generation.stop=length", "model.name=scaled", *run.overrides(tmp_path)]
    ended = harness(*model, *job)
    assert ended.status == 0, ended.stderr
    made = HarnessRun(0, 1.0, False, "", "", row=ended.row, record=ended.record)
    detail, found = scaled.of_simulation(made, 2, 6)
    assert detail.startswith("SIMULATED, not measured: 6 layers") and "a model of other sizes" in detail
    assert (found["measured_layers"], found["simulated_layers"]) == (2, 6)
    assert float(found["simulated_total_tokens_per_s"]) > 0
    assert not {"total_tokens_per_s", "output_tokens_per_s", "elapsed_s"} & found.keys()
    with pytest.raises(ValueError, match="not marked as simulated"):
        scaled.of_simulation(measured, 2, 6)


def test_what_there_is_no_time_for_is_left_over(tmp_path: Path, monkeypatch: Any) -> None:
    stage = Stage("matrix", tmp_path, limit_s=105.0)
    course = Course(stage, Models(stage, tmp_path), requests.Requests(tmp_path / "none.json", ""))
    monkeypatch.setattr(requests.Requests, "available", 1000)
    first = cases()[0]
    model = course.models.dummy("7B")
    monkeypatch.setattr(course, "_predict", lambda case, model: lambda count: 0.05 * count)
    choice = course.choice(first, model)  # nothing has run yet: what does not fit is made smaller
    assert choice == (500, 25.0)
    course._any = True
    assert course.choice(first, model) is None and course.left_over == [first.name]
    assert not stage.done(first.name)  # the next attempt runs it


def test_tuned_is_what_the_simulation_promises_most_of(tmp_path: Path) -> None:
    stage = Stage("matrix", tmp_path)
    course = Course(stage, Models(stage, tmp_path), requests.Requests(tmp_path / "none.json", ""))
    changes = [("engine.kv_memory doubled", 0.3), ("engine.token_budget=256", 0.2), ("engine.token_budget=64", 0.1)]
    plain = {"changes": [{"setting": setting, "gain": gain} for setting, gain in changes]}
    (stage.folder / f"explained {goals.OURS}.json").write_text(json.dumps(plain))
    assert course._promising(goals.OURS) == ("engine.token_budget=256",)
    tuned = next(case for case in cases() if case.tuned)
    assert course._pointless(tuned) == f"{goals.OURS} has no figures to go on from"
    stage.report(goals.OURS, Outcome.measured, total_tokens_per_s=10.0, requests=500, elapsed_s=3.0)
    assert course._pointless(tuned) is None
    assert course.choice(tuned, course.models.dummy("7B")) == (
        500,
        3.0,
    )  # the same requests as what it is compared with


def test_nothing_is_compiled_within_a_case(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    stage = Stage("matrix", tmp_path)
    course = Course(stage, Models(stage, tmp_path), requests.Requests(tmp_path / "none.json", ""))
    mii = next(case for case in cases() if case.name == goals.MII)
    assert str(course._pointless(mii)).startswith("not built: ragged_device_ops, ragged_ops, inference_core_ops")
    builds = Stage("builds", tmp_path)
    builds.report("ragged_ops", Outcome.refused, "no nvcc")
    assert course._pointless(mii) is None  # then the engine says itself why it cannot
    for name in mii.needs:
        (deepspeed_ops.folder(name) / f"{name}.so").touch()
    (tmp_path / "builds.jsonl").unlink()
    assert course._pointless(mii) is None


def test_the_profile_tells_a_decode_pass_from_a_mixed_one(checkpoint: Path, tmp_path: Path, one_thread: None) -> None:
    sizes = ["engine.token_budget=64", "engine.max_sequences=16", "engine.kv_memory=64MiB"]
    job = [f"model.path={checkpoint}", "model.dtype=float32", "engine.kernels=torch", "parallel=single", *sizes]
    engine = profile_pass.loaded(job)
    found = profile_pass.profiles(engine, 6, 20, 32)
    (decode, _), (mixed, _) = found
    assert (decode.tokens, decode.decodes, decode.prompt_tokens, decode.sequences) == (6, 6, 0, 6)
    assert (mixed.tokens, mixed.decodes, mixed.prompt_tokens) == (64, 6, 58)
    assert mixed.keys_read - 58 > decode.keys_read > 6 * 20
    for one in (decode, mixed):
        assert any(kernel.name == "aten::mm" for kernel in one.kernels) and one.kernel_s > 0
        assert sum(map(one.share, one.kernels)) == pytest.approx(1.0)
        assert len(profile_pass.text(one, top=4)) == 3 + 4
    profile_pass.write(found, engine.kernels, tmp_path)
    for name in ("decode", "mixed"):
        assert json.loads(gzip.decompress((tmp_path / f"{name}.json.gz").read_bytes()))["traceEvents"]
    assert [one["name"] for one in json.loads((tmp_path / "profile.json").read_text())["passes"]] == ["decode", "mixed"]


def test_the_profile_is_of_fastgen_on_one_device() -> None:
    with pytest.raises(UserError, match="the passes are fastgen's"):
        profile_pass.loaded(["engine=baseline"])
    with pytest.raises(UserError, match="passes of one are profiled"):
        profile_pass.loaded(["parallel.tp=1", "parallel.dp=2"])
