"""Whole runs as a user starts them: the launcher, the ranks, the record, and what happens when it goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from support.in_process import answered
from support.machine import kernels_on_cpu, needs_native
from support.runs import (
    PACED,
    RANDOM,
    ROOT,
    TINY,
    Run,
    assert_refused,
    check_against_ids,
    deepspeed,
    ended,
    python,
    ranks_of,
    start,
    variables,
)

from harness.config.identity import config_hash
from harness.results.columns import COLUMNS
from harness.results.table import read_rows
from harness.running import again, faults

Harness = Callable[..., Run]


def test_deepspeed_and_python_do_the_same_job(harness: Harness, tmp_path: Path, demo_model: Path) -> None:
    job = ["dataset.num_samples=4", "generation.max_output_len=8", "model.dtype=float32"]
    run = harness("engine=fastgen", *job, launcher=deepspeed(1))
    assert run.status == 0, run.stderr
    row, record = run.row, run.record
    assert tuple(row) == COLUMNS
    expected = {
        "status": "ok",
        "error": "",
        "engine": "fastgen",
        "kernels": kernels_on_cpu(demo_model, "float32"),
        "model": "smollm2_135m",
        "weights": "pretrained",
        "dtype": "float32",
        "dataset": "sample",
        "stop": "eos",
        "requests": "4",
        "completed": "4",
        "rejected": "0",
        "tp": "1",
        "dp": "1",
        "device": "cpu",
        "token_budget": "512",
        "max_sequences": "64",
        "preemptions": "0",
    }
    assert {name: row[name] for name in expected} == expected
    for name in ("dataset_sha256", "load_s", "warmup_s", "ttft_p50_s", "latency_p99_s", "steps", "config_hash"):
        assert row[name], name
    assert 0 < int(row["peak_memory_bytes"]) < 3 * 2**30
    assert float(row["model_flops_utilisation"]) > 0
    check_against_ids(run)
    assert {path.name for path in run.directory.iterdir()} == {
        "record.json",
        "config.yaml",
        "completions.jsonl",
        "passes.csv",
        "telemetry.csv",
        "run.lock",
        "run.log",
    }
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["dataset"]["num_samples"] == 4
    assert record["prompt_len_check"] == {
        "checked": 4,
        "differing": 0,
        "sum_of_differences": 0,
        "first_difference": None,
    }
    assert record["environment"]["packages"]["torch"]
    assert any("max_output_len=8" in note for note in record["notes"])
    assert row["run_id"] in run.stdout
    assert "total tokens/s" in run.stdout

    again = harness("engine=baseline", *job, results=tmp_path / "again")
    assert again.status == 0, again.stderr
    assert again.row["engine"] == "baseline"
    assert again.row["token_budget"] == again.row["kv_peak_utilisation"] == ""
    assert again.token_ids == run.token_ids
    check_against_ids(again)


def test_a_dataset_that_claims_wrong_lengths_is_counted_by_what_was_fed(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([["abc", 4, 5], ["ab", 9, 200], ["a" * 300, 301, 5], ["abcd", 5, 3]]))
    job = [f"dataset.path={file}", "model.max_context=64", "generation.max_output_len=20"]
    job.append("hardware.peak_flops.float32=1e12")
    run = harness(*TINY, "dataset=asc24", *job)
    assert run.status == 0, run.stderr
    lines = run.completions
    assert [lines[index]["finish_reason"] for index in range(4)] == ["length", "length", "rejected", "length"]
    assert [lines[index]["output_tokens"] for index in range(4)] == [5, 20, 0, 3]  # exactly output_len, or the cap
    assert [lines[index]["prompt_tokens"] for index in range(4)] == [4, 3, 0, 5]  # bytes and BOS
    assert "301 tokens + output_len 5 exceeds the model's context of 64" in lines[2]["error"]
    assert (run.row["requests"], run.row["completed"], run.row["rejected"]) == ("4", "3", "1")
    check = run.record["prompt_len_check"]
    assert (check["checked"], check["differing"], check["sum_of_differences"]) == (3, 1, -6)
    assert run.stdout.count("only tokens fed are counted") == 1
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 96)  # multiplications a token
    flops = 0
    for prompt, output in ((4, 5), (3, 20), (5, 3)):
        fed = prompt + output - 1
        flops += 2 * layers * fed + 2 * 32_000 * 64 * output + 4 * 2 * 64 * fed * (fed + 1) // 2
    assert run.record["model_flops"] == flops
    used = flops / (float(run.row["elapsed_s"]) * 1e12)
    assert float(run.row["model_flops_utilisation"]) == pytest.approx(used, rel=1e-4)
    assert "hardware_measured" not in run.record  # what is given wins
    check_against_ids(run)


def test_two_replicas_share_one_queue(harness: Harness, tmp_path: Path) -> None:
    job = [*TINY, *RANDOM, "dataset.num_samples=60", "dataset.input_len=30", "dataset.output_len=12"]
    alone = harness(*job, results=tmp_path / "alone")
    assert alone.status == 0, alone.stderr
    bare = deepspeed(2, "--no_local_rank")
    both = harness(*job, "parallel.dp=2", "engine.max_sequences=4", launcher=bare, cold=True)
    assert both.status == 0, both.stderr
    assert both.row["status"] == "ok"
    assert (both.row["dp"], both.row["completed"]) == ("2", "60")
    assert both.token_ids == alone.token_ids
    check_against_ids(both)
    # Rank 0 did not do it all: its passes, which alone are in passes.csv, are fewer than all passes.
    passes = (both.directory / "passes.csv").read_text().count("\n") - 1
    assert 0 < passes < int(both.row["steps"])


@pytest.mark.slow
def test_finished_requests_cost_no_memory(harness: Harness, tmp_path: Path) -> None:
    peaks = []
    for count in (500, 10_000):
        job = [f"dataset.num_samples={count}", "dataset.input_len=8", "dataset.output_len=4"]
        run = harness(*TINY, *RANDOM, *job, results=tmp_path / str(count))
        assert run.status == 0, run.stderr
        assert run.row["completed"] == str(count)
        peaks.append(int(run.row["peak_memory_bytes"]))
    # 9,500 requests more: the list of requests itself, read before the run, is about 5 MiB.
    assert peaks[1] - peaks[0] < 24 * 2**20


BAD = [
    (["dataset=asc24", "dataset.path=nowhere.json"], "dataset.path: no such file: 'nowhere.json'"),
    (["dataset=asc24"], "dataset.path: "),
    (["dataset=asc24", "dataset.path={empty}"], "dataset.path: "),
    (["dataset=asc24", "dataset.path={broken}"], "dataset.path: "),
    (["dataset=asc24", "dataset.path={negative}"], "record 1 (counting from 0)"),
    (["dataset.num_samples=100000"], "dataset.num_samples: "),
    (["dataset.output_len=5"], "dataset.output_len: "),
    (["model.path=no/such/model/here"], "model.path: no such directory"),
    (["model.path={directory}"], "model.path: "),
    (["model=llama2_7b"], "model.path: not set"),
    (["engine=mii"], "engine: mii needs CUDA"),
    (["engine=ds_inference", "engine.kernel_inject=true"], "engine.kernel_inject: "),
    pytest.param(
        ["engine.kernels=native", "parallel.tp=2"],
        "engine.kernels: native: they do not shard a model (parallel.tp); use engine.kernels=torch or auto",
        marks=needs_native,
    ),
    (["model=llama2_70b", "model.weights=dummy", "model.dtype=float32"], "model: float32 weights need 257.0 GiB"),
]


@pytest.mark.parametrize(("overrides", "line"), BAD, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_what_the_user_can_mend_is_one_line(tmp_path: Path, overrides: list[str], line: str) -> None:
    files = {name: str(tmp_path / name) for name in ("empty", "broken", "negative", "directory")}
    Path(files["empty"]).write_text("")
    Path(files["broken"]).write_text('[["a", 1, 1')
    Path(files["negative"]).write_text('[["a", 1, 1], ["b", 1, -1]]')
    Path(files["directory"]).mkdir()
    results = tmp_path / "results"
    done = answered(*(override.format(**files) for override in overrides), f"results_dir={results}")
    assert_refused(done, "error: ")
    assert line in done.stderr
    (row,) = read_rows(results / "runs.csv")
    assert row["status"] == "invalid"
    assert line in row["error"]


@pytest.mark.slow
def test_a_run_whose_requests_are_all_rejected_is_no_result(harness: Harness) -> None:
    run = harness(*TINY, *RANDOM, "dataset.num_samples=2", "dataset.input_len=5000", "dataset.output_len=4")
    assert run.status == 2
    assert (run.row["status"], run.row["completed"], run.row["rejected"]) == ("invalid", "0", "2")
    assert "error: all 2 requests were rejected; the last: prompt of 5000 tokens" in run.stderr


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.path=${oops}", "error: command line: Interpolation key 'oops' not found"),
        ("engine=null", "error: command line: Config group override must be"),
        ("engine=[fastgen,baseline]", "error: engine: no option, or several"),
        ("generation.max_output_len=" + "1" * 5000, "error: command line: "),
        ("model.path=foo/not-here", "error: model.path: foo/not-here is not in the local cache"),
        (
            "dataset.path=/x/a,b(1).json",
            "error: command line: 'dataset.path=/x/a,b(1).json' cannot be read; a value with commas, brackets or "
            "quotes needs quotes inside the shell's: \"dataset.path='/x/a,b(1).json'\"\n",
        ),
        (
            "dataset.path=/x/a,b.json",
            "error: command line: 'dataset.path=/x/a,b.json' may be several values; for a sweep add -m; a "
            "value with commas, brackets or quotes needs quotes inside the shell's: "
            "\"dataset.path='/x/a,b.json'\"\n",
        ),
        ("dataset.path='/x/a,b(1).json'", "error: dataset.path: '/x/a,b(1).json' given with dataset=sample"),
        ("dataset.path='/x/it\\'s(1).json'", 'error: dataset.path: "/x/it\'s(1).json" given with dataset=sample'),
    ],
)
def test_odd_command_lines_are_one_line_too(tmp_path: Path, override: str, line: str) -> None:
    assert_refused(answered(override, f"results_dir={tmp_path}", HF_HUB_OFFLINE="1"), line)


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", "/proc/results"):
        assert_refused(python("harness/main.py", f"results_dir={place}"), "error: results_dir: ")


@pytest.mark.slow
def test_under_deepspeed_a_refusal_is_one_line_too(harness: Harness) -> None:
    run = harness("dataset=asc24", "dataset.path=nowhere.json", launcher=deepspeed(1, "--log_level", "critical"))
    assert run.status == 2
    assert "Traceback" not in run.stderr + run.stdout
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {run.row['error']}",
    ]
    assert run.row["status"] == "invalid"


@pytest.mark.slow
def test_a_launch_of_the_wrong_size_says_so(harness: Harness) -> None:
    run = harness(*TINY, *RANDOM, "parallel=single", launcher=deepspeed(2, "--log_level", "critical"))
    assert run.status == 2
    assert "error: parallel: tp=1 x dp=1 needs 1 ranks, the launch has 2" in run.stderr
    assert run.row["status"] == "invalid"


FEW = ["dataset.num_samples=8", "generation.max_output_len=4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "overrides", "asked", "split", "why"),
    [
        ("--num_gpus", [], (None, None), (1, 2), "each rank has room for the whole model"),
        ("--num_accelerators", ["parallel.tp=2"], (2, None), (2, 1), "dp follows from parallel.tp and 2 ranks"),
    ],
)
def test_deepspeed_by_itself_splits_its_ranks(
    harness: Harness,
    flag: str,
    overrides: list[str],
    asked: tuple[int | None, int | None],
    split: tuple[int, int],
    why: str,
) -> None:
    launcher = tuple(flag if word == "--num_accelerators" else word for word in deepspeed(2))
    run = harness(*FEW, *overrides, launcher=launcher)
    assert run.status == 0, run.stderr
    assert (run.row["tp"], run.row["dp"], run.row["completed"]) == (str(split[0]), str(split[1]), "8")
    asked_for = {"tp": asked[0], "dp": asked[1]}
    assert run.record["split"] == {"asked": asked_for, "tp": split[0], "dp": split[1], "why": why}
    settled = {"tp": split[0], "dp": split[1]}
    assert run.record["config"]["parallel"] == settled
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["parallel"] == settled
    assert run.record["config_hash"] == config_hash(run.record["config"])
    assert f"2 ranks (tp={split[0]}, dp={split[1]}), chosen: {why}" in " ".join(run.stdout.split())


def test_python_by_itself_starts_one_rank_which_is_the_job_it_was(harness: Harness, tmp_path: Path) -> None:
    job = [*TINY, *RANDOM, *FEW, "dataset.input_len=4", "dataset.output_len=4"]
    run, single = harness(*job), harness(*job, "parallel=single", results=tmp_path / "single")
    assert (run.status, single.status) == (0, 0), run.stderr + single.stderr
    assert (run.row["tp"], run.row["dp"]) == ("1", "1")
    assert "1 rank (tp=1, dp=1), chosen: one rank where no launch brings more" in " ".join(run.stdout.split())
    assert "1 rank (tp=1, dp=1) " in single.stdout.replace("\n", " ") and "chosen" not in single.stdout
    assert run.record["split"]["asked"] == {"tp": None, "dp": None}
    assert single.record["split"] == {"asked": {"tp": 1, "dp": 1}, "tp": 1, "dp": 1, "why": "as given"}
    assert [run.record[name] for name in ("config_hash", "job_hash")] == [
        single.record[name] for name in ("config_hash", "job_hash")
    ]


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    status, stderr, row = ended(process, tmp_path)
    assert status == 130
    assert row["status"] == "interrupted"
    assert "Traceback" not in stderr
    assert stderr.startswith("error: interrupted (what was finished is in ")
    assert isinstance(process.args, list)
    assert shlex.split(stderr.splitlines()[-1]) == ["python", *process.args[1:], f"resume={row['run_id']}"]


@pytest.mark.slow
def test_ctrl_c_under_deepspeed_keeps_what_was_finished(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED, launcher=deepspeed(1))
    os.kill(ranks_of(process)[0].pid, signal.SIGINT)
    status, stderr, row = ended(process, tmp_path)
    assert status == 130
    assert row["status"] == "interrupted"
    assert isinstance(process.args, list)
    assert shlex.join(["deepspeed", *process.args[1:], f"resume={row['run_id']}"]) in stderr.splitlines()


def test_the_command_that_resumes_a_run_is_quoted_for_a_shell() -> None:
    odd = "dataset.path='a b,[c]$HOME;(1).json'"
    said = again.resume_run(["harness/main.py", "resume=other", odd, "repeat=1", "requeue=true"], "a-run")
    assert shlex.split(said) == ["python", "harness/main.py", odd, "resume=a-run"]
    assert shlex.split(again.resume_run(["/venv/bin/run-it", odd], "a-run")) == ["run-it", odd, "resume=a-run"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["harness", "deepspeed", "deepspeed.launcher.launch"])
def test_a_killed_launch_leaves_no_stray_ranks(tmp_path: Path, killed: str) -> None:
    ours = ["parallel.dp=2"] if killed == "harness" else PACED
    process = start(tmp_path, *ours, launcher=(sys.executable,) if killed == "harness" else deepspeed(1))
    family = psutil.Process(process.pid).children(recursive=True)
    if "launch" in killed:
        next(child for child in family if killed in child.cmdline()).kill()
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "failed"
    assert row["error"] == "the launching process was killed, or ended before its ranks"
    assert int(row["completed"]) > 0


@pytest.mark.slow
def test_a_killed_rank_leaves_a_row(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED)
    process.kill()
    status, stderr, row = ended(process, tmp_path)
    assert status == -signal.SIGKILL
    assert row["status"] == "failed"
    assert row["error"].startswith("rank 0 was ended by signal SIGKILL, and not because memory ran out")
    assert stderr == f"error: {row['error']} ({faults.way_on(tmp_path / row['run_id'], row['run_id'])})\n"


def test_one_rank_is_one_process(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED)
    assert not psutil.Process(process.pid).children(recursive=True)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*/record.json"))
    assert record["pid"] == process.pid
    process.terminate()
    status, stderr, row = ended(process, tmp_path)
    assert (status, row["status"]) == (130, "interrupted")
    assert stderr.startswith("error: interrupted (what was finished is in ")


def test_a_terminal_that_is_closed_interrupts_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED)
    process.send_signal(signal.SIGHUP)
    status, _, row = ended(process, tmp_path)
    assert (status, row["status"]) == (130, "interrupted")


@pytest.mark.slow
def test_a_killed_replica_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, "parallel.dp=2", forked=True)
    ranks_of(process)[1].kill()
    status, _, row = ended(process, tmp_path)
    assert status == 1
    assert row["status"] == "failed"
    assert "another rank died" in row["error"]


@pytest.mark.slow
def test_timeout_s_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED, "timeout_s=10")
    status, stderr, row = ended(process, tmp_path)
    assert status == 1
    assert row["status"] == "timeout"
    assert "timeout_s=10" in row["error"]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["engine.kernels=deepspeed"],
            "error: engine.kernels: deepspeed: 9 query to 3 key-value heads is a ratio of 3,",
        ),
        (
            ["model=llama2_7b", "model.weights=dummy", "engine.kernels=deepspeed", "model.dtype=float32"],
            "error: engine.kernels: deepspeed: they compute in float16 or bfloat16, not in float32;",
        ),
        (["model=llama2_7b", "model.weights=dummy", "parallel.tp=512"], "error: parallel.tp: 512 ranks share 32 key"),
    ],
)
def test_what_deepspeed_s_kernels_cannot_compute_is_refused_before_anything_is_loaded(
    tmp_path: Path, overrides: list[str], line: str
) -> None:
    assert_refused(answered(*overrides, f"results_dir={tmp_path}", DS_ACCELERATOR="cuda"), line)
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "invalid"


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv" / "installed-test").exists() or (ROOT / ".venv").is_symlink(),
    reason="needs an environment made by launch/test.sh for this checkout: another's would be set up anew",
)
def test_run_sh_hands_its_overrides_to_the_harness_alone() -> None:
    line = ["bash", "launch/run.sh", "experiment=quickstart", "engine.token_budget=123", "--cfg", "job"]
    done = subprocess.run(line, cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    assert (composed["dataset"]["num_samples"], composed["engine"]["token_budget"]) == (16, 123)
