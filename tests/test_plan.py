"""The plan command: what fits, which splits there are, what is refused; and the same sums before a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from support.runs import ROOT, Run, variables

from harness.basics.errors import UserError
from harness.engines.catalogue import register
from harness.machine import snapshot
from harness.plan import __main__ as command
from harness.plan import text
from harness.ranks.rank import Rank
from harness.running import job

SEVENTY = ("model=llama2_70b", "model.dtype=float16", "hardware=a100_80g")
FIXED = ("dataset=synthetic", "dataset.num_samples=1000", "dataset.input_len=512", "dataset.output_len=512")


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Returns a function that plans in this process: exit status, and the plan as data."""

    def planned(*words: str) -> tuple[int, Any]:
        status = command.main([*words, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return planned


@pytest.mark.parametrize(
    ("words", "status", "fits"),
    [
        (("parallel.tp=8",), 0, "yes"),
        (("parallel.tp=2",), 0, "with short contexts only"),
        (("parallel.tp=1",), 1, "no"),
        (("parallel.tp=1", "--weight-bits", "4"), 0, "yes"),
    ],
)
def test_70b_fits_where_it_should(plan: Callable[..., Any], words: tuple[str, ...], status: int, fits: str) -> None:
    found_status, found = plan(*SEVENTY, *FIXED, "engine.max_sequences=64", *words)
    assert (found_status, found["fits"]) == (status, fits)
    memory = found["memory"]
    parts = ("own_bytes", "weights_bytes", "activations_bytes", "kv_cache_bytes", "left_bytes")
    assert sum(memory[name] for name in parts) == memory["size_bytes"] == 80_000_000_000
    better = {one["setting"]: one["fits"] for one in found["remedies"]}
    assert ("parallel.tp=4" in better) == (fits != "yes")
    assert fits != "no" or better["weights of 4 bits (--weight-bits 4)"] == "yes"
    assert ("bounds" in found) == (fits != "no")


@pytest.mark.parametrize(
    ("model", "tp", "weights"),  # bytes of a device in 16 bits; what its ranks all hold is counted with each
    [
        ("llama3_1_70b", 8, 2 * 70_553_706_496 / 8),
        ("llama3_2_1b", 1, 2 * 1_235_814_400),
        ("qwen3_32b", 4, 2 * 32_762_123_264 / 4),
        ("qwen2_5_7b", 4, 2 * 7_615_616_512 / 4),
        ("mistral_7b", 2, 2 * 7_248_023_552 / 2),
        ("phi4", 1, 2 * 14_659_507_200),
    ],
)
def test_the_models_of_the_configs_are_planned(plan: Callable[..., Any], model: str, tp: int, weights: float) -> None:
    status, found = plan(f"model={model}", "hardware=h100_80g", *FIXED, f"parallel.tp={tp}")
    assert (status, found["model"]["name"]) == (0, model)
    embeddings = 2 * 152_064 * 8192  # of the largest, which tensor parallelism may leave whole
    assert weights <= found["memory"]["weights_bytes"] <= weights + embeddings


def test_the_plan_says_what_published_systems_reached(plan: Callable[..., Any]) -> None:
    _, found = plan(*SEVENTY, *FIXED, "parallel.tp=8")
    shares = {one["system"]: one["share"] for one in found["published"] if one["workload"].startswith("512")}
    assert shares["optimum"] == pytest.approx(1, rel=0.05)
    assert shares["DeepSpeed-FastGen"] == pytest.approx(490 / 1857, rel=0.05)
    assert plan("model=llama2_7b", "hardware=a100_80g", *FIXED)[1]["published"] == []
    mix = found["bounds"]["mix"]
    assert mix["binds"] == "compute" and mix["total_tokens_per_s"] < mix["sheet_total_tokens_per_s"]
    assert found["dataset_time"]["expected_s"] > found["dataset_time"]["bound_s"]
    assert [one["token_budget"] for one in found["passes"]] == [128, 256, 512, 1024, 2048, 4096, 8192]


def test_every_split_is_judged_by_the_real_checks(plan: Callable[..., Any]) -> None:
    status, found = plan(*SEVENTY, *FIXED, "--devices", "64")
    assert status == 0
    assert {(one["tp"], one["dp"]) for one in found["splits"]} == {(1, 64), (2, 32), (4, 16), (8, 8)}
    assert [one["tp"] for one in found["refused"]] == [16, 32, 64]
    assert all("does not divide its 64 attention and 8 key/value heads" in one["why"] for one in found["refused"])
    rates = [one["expected_total_tokens_per_s"] for one in found["splits"]]
    assert rates[-1] is None and found["splits"][-1]["tp"] == 1  # what does not fit comes last
    assert rates[:-1] == sorted(rates[:-1], reverse=True)
    assert found["hardware"]["nodes"] == 8
    _, other = plan(*SEVENTY, *FIXED, "engine=mii", "--devices", "8")
    assert {one["tp"] for one in other["splits"]} == {8}
    assert all("one replica a launch" in one["why"] for one in other["refused"])
    _, given = plan(*SEVENTY, *FIXED, "--devices", "8", "parallel.tp=4")
    assert [(one["tp"], one["dp"]) for one in given["splits"]] == [(4, 2)]


def test_a_model_shared_by_hosts_takes_their_link(plan: Callable[..., Any]) -> None:
    words = (*SEVENTY, *FIXED, "--devices", "8", "--nodes", "2", "parallel.tp=8", "hardware.node_bandwidth=1e9")
    _, found = plan(*words)
    assert found["hardware"]["nodes"] == 2 and found["splits"][0]["binds"] == "interconnect"


def test_a_split_is_chosen_as_a_run_would(plan: Callable[..., Any]) -> None:
    status, found = plan("model=llama2_70b", "hardware=a100_80g", *FIXED)
    assert status == 0 and (found["parallel"]["tp"], found["parallel"]["dp"]) == (2, 1)
    status, found = plan("model=llama2_70b", "hardware=a100_80g", "hardware.memory_bytes=8000000000", *FIXED)
    assert (status, found["parallel"]["tp"], found["fits"]) == (1, 8, "no")


def test_a_cache_of_too_many_bytes_has_no_room(plan: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = (*SEVENTY, *FIXED, "parallel.tp=8", "engine.kv_memory=200GiB")
    status, found = plan(*words)
    assert (status, found["fits"]) == (1, "no")
    assert found["remedies"][0] == {"setting": "engine.kv_memory=0.9 of what is left", "fits": "yes"}
    assert command.main(list(words)) == 1
    assert "no room for the KV cache of engine.kv_memory beside the weights." in capsys.readouterr().out
    assert plan(*SEVENTY, *FIXED, "parallel.tp=8", "engine.kv_memory=40GiB")[1]["fits"] == "yes"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hardware.accelerator=cuda", "hardware.memory_bytes=8000000000"), "hardware.peak_flops.bfloat16: not known"),
        (("hardware=a100_80g", "hardware.memory_bytes=null"), "hardware.memory_bytes: not known of a100_80g; give "),
        (("hardware=a100_80g", "hardware.memory_bytes=much"), "hardware.memory_bytes"),
        (("hardware=a100_80g", "parallel.tp=2"), "parallel.tp: 2 does not divide its 9 attention and 3 key/value"),
        (("hardware=a100_80g", "--devices", "6", "parallel.tp=4"), "parallel.tp: 4 does not divide the 6 devices"),
        (("hardware=a100_80g", "--devices", "6", "parallel.tp=3", "parallel.dp=1"), "parallel: tp=3 x dp=1 is not 6"),
        (("hardware=a100_80g", "--devices", "6", "--nodes", "4"), "--nodes: 4 does not divide the 6 devices"),
        (("hardware=a100_80g", "--nodes", "4"), "--nodes: means nothing without --devices"),
        (("--devices", "none"), "command line: argument --devices: 'none' is not a whole number of at least 1"),
        (("--weight-bits", "5"), "command line: argument --weight-bits"),
        (("hardware=a100_80g", "dataset=synthetic", "dataset.input_len=9999", "dataset.output_len=1"), "longer than"),
        (("model=llama2_7b", "model.architecture.model_type=gpt_neox", "hardware=a100_80g"), "model: the sizes of"),
        (("hardware=none",), "hardware"),
    ],
)
def test_a_wrong_question_is_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err, captured.err


def test_the_command_imports_nothing_heavy() -> None:
    words = [*SEVENTY, *FIXED, "parallel.tp=8"]
    code = (
        "import sys; from harness.plan.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'deepspeed', 'pandas', 'rich'} & set(sys.modules);"
        "sys.exit(status or len(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=variables(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for part in ("It fits: yes.", "Memory of a device", "Token budget", "Bound, tok/s", "DeepSpeed-FastGen", "26% of"):
        assert part in done.stdout
    assert all(len(line) == len(line.rstrip()) for line in done.stdout.splitlines())


def test_a_predicted_time_stands_beside_the_fit_s_error(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_7b", "hardware=h100_80g", "parallel.tp=1", *FIXED, "--json"]
    assert command.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dataset_time"]["fit_error"] is None and "not fitted to any run" in text.plan(found)
    found["dataset_time"] |= {"fitted": True, "fit_error": 0.0423}
    assert "by a fit that was at most 4.2% off the time of a real run" in " ".join(text.plan(found).split())
    found["dataset_time"]["fit_error"] = None
    assert "by a fit to real runs, of no known error" in " ".join(text.plan(found).split())


def test_a_plan_has_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_7b", "hardware=h100_80g", "parallel.dp=2", *FIXED]
    assert command.main([*words, "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert free["dataset_time"]["expected_cost_per_million_tokens"] is None and "cost" not in text.plan(free)
    assert command.main([*words, "hardware.price_per_hour=2.5"]) == 0
    rate = free["dataset_time"]["expected_total_tokens_per_s"]
    assert f"A million total tokens cost {2.5 * 2 / 3600 / rate * 1e6:,.4g}, by" in capsys.readouterr().out


# --- before a real run ---


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.skipif(snapshot.device_memory_bytes() is not None, reason="the GPU here has a size of its own")
@pytest.mark.parametrize(
    ("words", "ranks", "refused"),
    [
        (["parallel=tp2"], 2, None),
        (
            ["parallel=single"],
            1,
            "parallel.tp: 1: a rank needs 128.5 GiB of weights, its device has 74.5 GiB; "
            "use larger devices or a smaller model; preflight=false tries it all the same",
        ),
        (["parallel=dp8"], 8, "use parallel.tp=2, or more devices; preflight=false"),
        (["parallel=tp2", "engine.kv_memory=20GiB"], 2, "64.5 GiB of weights and 20.0 GiB of KV cache"),
        (["parallel=tp2", "engine.kv_memory=20GiB"], 2, "give engine.kv_memory at most 10.0GiB, or a fraction"),
        (["parallel=single", "engine.quantization=wf6af16"], 1, None),
        (["parallel=single", "engine=baseline"], 1, None),  # spreads it over devices
        (["parallel=single", "preflight=false"], 1, None),
    ],
)
def test_what_devices_cannot_hold_is_refused(conf: None, words: list[str], ranks: int, refused: str | None) -> None:
    composed = compose("config", [*SEVENTY, "model.weights=dummy", *words])
    if refused is None:
        found = job.prepare(composed, Rank(0, ranks, 0, ranks))
        predicted = found.prediction.get("peak_memory_bytes")
        assert predicted is None or predicted > 30e9
        return
    with pytest.raises(UserError) as error:
        job.prepare(composed, Rank(0, ranks, 0, ranks))
    assert refused in str(error.value)


def test_what_a_cpu_cannot_hold_is_refused(conf: None, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for words, said in (
        (["engine.kv_memory=100000GiB"], "engine.kv_memory: 100000GiB asks for 100000.0 GiB, "),
        (["model=llama2_70b", "model.weights=dummy", "model.dtype=float32"], "use a smaller model or model.dtype="),
    ):
        with pytest.raises(UserError) as error:
            job.prepare(compose("config", ["parallel=single", *words]))
        assert said in str(error.value)
        job.prepare(compose("config", ["parallel=single", *words, "preflight=false"]))


def test_preflight_changes_nothing_of_the_job(conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one, other = (job.prepare(compose("config", [f"preflight={flag}"])) for flag in ("true", "false"))
    assert one.job_hash == other.job_hash
    assert one.prediction["peak_memory_bytes"] > 134_000_000 * 2


@pytest.mark.slow
def test_the_record_has_the_prediction_beside_the_measurement(harness: Callable[..., Run]) -> None:
    done = harness("dataset.num_samples=2", "generation.max_output_len=4")
    record = done.record
    assert record["prediction"]["peak_memory_bytes"] == pytest.approx(record["peak_memory_bytes"], rel=0.5)
    assert " predicted)" in done.stdout
