"""sweep.py, tune.py and Hydra's launcher: many runs, of which some crash, hang, repeat or were done before."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from support.in_process import answered
from support.runs import (
    PACED,
    RANDOM,
    ROOT,
    SIMULATED,
    TINY,
    Run,
    assert_refused,
    begun,
    command,
    deepspeed,
    wait_until_begun,
)

from harness.results.table import read_rows
from harness.running.sweep import finished_runs
from harness.running.sweep_table import Follower, SweepJob, SweepRun, choices, like_the_best, run_line, spread, table_of

Harness = Callable[..., Run]
SMALL = [*TINY, *RANDOM, "dataset.num_samples=3", "dataset.input_len=70", "dataset.output_len=3"]

ODD = ROOT / "tests" / "support" / "odd"


@pytest.fixture
def odd_engine(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a machine with an engine that dies or hangs, until the file ODD_MENDED is there."""
    installed = tmp_path / "site" / "odd_engine-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-engine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[harness.engines]\nodd = odd_engine.room:ROOM\n")
    return {"PYTHONPATH": f"{installed.parent}:{ODD}", "ODD_MENDED": str(tmp_path / "mended")}


def alive_with(text: str) -> list[list[str]]:
    """Returns the command lines of processes that name ``text``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(text in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(words)
    return found


@pytest.mark.endurance
def test_a_sweep_survives_two_crashes_and_a_hang_and_then_runs_only_those(
    harness: Harness, tmp_path: Path, odd_engine: dict[str, str], scale: Callable[..., Any]
) -> None:
    seeds = scale([*range(1, 10)], [*range(1, 13)], [1, 3, 9, 2])
    broken = [seed for seed in seeds if seed in (3, 6, 9)]
    jobs, good = len(seeds), len(seeds) - len(broken)
    job = [
        *SMALL,
        "engine=odd",
        f"hydra.searchpath=[file://{ODD / 'conf'}]",
        "hardware=h100_80g",
        "timeout_s=6",
        f"dataset.seed={','.join(map(str, seeds))}",
    ]
    first = harness("-m", *job, **odd_engine)
    assert first.status == 1
    assert "Traceback" not in first.stdout + first.stderr
    assert alive_with(str(tmp_path)) == []

    def seed_of(row: dict[str, str]) -> int:
        record = json.loads((first.results / row["run_id"] / "record.json").read_text())
        return record["config"]["dataset"]["seed"]

    statuses = {seed_of(row): row["status"] for row in first.rows}
    assert list(statuses) == seeds
    assert [seed for seed, status in statuses.items() if status != "ok"] == broken
    errors = {seed_of(row): row["error"] for row in first.rows}
    ends = {3: ("failed", "SIGABRT"), 6: ("failed", "SIGKILL"), 9: ("timeout", "timeout_s=6")}
    for seed in broken:
        status, words = ends[seed]
        assert statuses[seed] == status and words in errors[seed]
    assert f"{good} of {jobs} jobs ok" in first.stdout
    assert "sweep.resume=true" in first.stdout
    log = (first.results / first.rows[0]["run_id"] / "launch.log").read_text()
    assert "total tokens/s" in log  # what the job would have printed is kept, and not on the sweep's terminal
    assert "Throughput" not in first.stdout

    (tmp_path / "mended").touch()
    again = harness("-m", *job, "sweep.resume=true", **odd_engine)
    assert again.status == 0, again.stdout + again.stderr
    assert again.stdout.count("(ran before)") == good
    assert [seed_of(row) for row in again.rows[jobs:]] == broken
    assert {row["status"] for row in again.rows[jobs:]} == {"ok"}
    assert f"{jobs} of {jobs} jobs ok" in again.stdout


@pytest.mark.slow
def test_a_job_that_cannot_run_is_a_row_and_the_others_are_repeated(harness: Harness) -> None:
    run = harness("-m", *SMALL, *SIMULATED, "engine.token_budget=16,64", "engine.max_sequences=32", "repeat=3")
    assert run.status == 2
    refused, *repeated = run.rows
    assert (refused["status"], refused["token_budget"]) == ("invalid", "")
    assert "job 1: invalid: engine.token_budget: 16 is below engine.max_sequences=32" in run.stdout
    assert "1 of 2 jobs ok" in run.stdout
    assert [(row["status"], row["token_budget"]) for row in repeated] == [("ok", "64")] * 3
    assert len({row["run_id"] for row in repeated}) == 3
    assert len({row["config_hash"] for row in repeated}) == 1
    assert len(finished_runs(str(run.results))) == 1
    records = [json.loads((run.results / row["run_id"] / "record.json").read_text()) for row in repeated]
    rates = [record["total_tokens_per_s"] for record in records]  # the row's are rounded
    assert f"{statistics.median(rates):,.1f}  {min(rates):,.1f} to {max(rates):,.1f} (" in run.stdout


def test_repeated_jobs_run_in_rounds_of_which_every_other_goes_backwards(harness: Harness) -> None:
    run = harness("-m", *SMALL, *SIMULATED, "dataset.seed=1,2", "repeat=2")
    assert run.status == 0, run.stdout + run.stderr
    records = [json.loads((run.results / row["run_id"] / "record.json").read_text()) for row in run.rows]
    assert [record["config"]["dataset"]["seed"] for record in records] == [1, 2, 2, 1]
    assert [record["round"]["number"] for record in records] == [1, 1, 2, 2]
    assert len({record["round"]["series"] for record in records}) == 1
    assert len({record["config_hash"] for record in records}) == 2
    heads = [line for line in run.stdout.splitlines() if line.startswith("[")]
    assert heads == ["[1/2] dataset.seed=1", "[2/2] dataset.seed=2", "[1/2] dataset.seed=1, run 2"]


def test_a_simulated_job_is_repeated_only_as_often_as_is_missing(harness: Harness) -> None:
    job = [*SMALL, *SIMULATED, "sweep.resume=true"]
    assert harness("repeat=2", *job).status == 0
    again = harness("repeat=3", *job)
    assert again.status == 0, again.stdout + again.stderr
    assert again.stdout.count("(ran before)") == 2 and again.stdout.count("(simulated)") == 3
    assert [(row["status"], row["simulated"]) for row in again.rows] == [("ok", "data sheet")] * 3
    assert len({row["total_tokens_per_s"] for row in again.rows}) == 1  # nothing in it is random


@pytest.mark.slow
def test_a_run_is_repeated_until_its_median_is_known(harness: Harness) -> None:
    run = harness(*SMALL, *SIMULATED, "repeat_until=2%")
    assert run.status == 0, run.stdout + run.stderr
    assert len(run.rows) == 3  # nothing in a simulated one is random, and of fewer there is no interval
    assert "99% interval" in run.stdout and "(0.0%)" in run.stdout


@pytest.mark.slow
def test_deepspeed_with_m_drives_the_sweep_from_its_first_rank(harness: Harness) -> None:
    run = harness("-m", *SMALL, *SIMULATED, "parallel.dp=1,2", launcher=deepspeed(2))
    assert run.status == 0, run.stderr
    assert [(row["status"], row["dp"]) for row in run.rows] == [("ok", "1"), ("ok", "2")]
    assert run.stdout.count("2 of 2 jobs ok") == 1


@pytest.mark.slow
def test_a_sweep_whose_reader_leaves_goes_on(tmp_path: Path) -> None:
    arguments = command("-m", *SMALL, *SIMULATED, "dataset.seed=1,2", f"results_dir={tmp_path / 'results'}")
    process = begun(arguments)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "[1/2] dataset.seed=1\n"
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read()) == (0, "")
    assert [row["status"] for row in read_rows(tmp_path / "results" / "runs.csv")] == ["ok", "ok"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launch_over_several_hosts_says_how_to_sweep_instead(tmp_path: Path, rank: int) -> None:
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": str(rank)}
    for words in (["-m", "engine.token_budget=64,128"], ["repeat=2"]):
        done = answered(*words, f"results_dir={tmp_path}", **where)
        assert done.returncode == 2
        assert done.stdout == ""
        if rank == 0:
            assert_refused(done, f"error: {words[0]}: several runs need several launches, and this one spans 2 hosts; ")
        else:
            assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_current_job_and_leaves_the_sweep_resumable(tmp_path: Path) -> None:
    words = ["-m", *TINY, *RANDOM, *PACED, "dataset.input_len=16", "dataset.output_len=16"]
    words.append("dataset.num_samples=4,10000,5")
    arguments = command(*words, f"results_dir={tmp_path / 'results'}")
    process = begun(arguments)
    wait_until_begun(tmp_path / "results", process, size=10_000)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "error: interrupted\n"
    assert [row["status"] for row in read_rows(tmp_path / "results" / "runs.csv")] == ["ok", "interrupted"]
    told, last = stdout.splitlines()[-2:]
    assert told == "interrupted; this does the rest:"
    assert shlex.split(last) == ["python", *arguments[1:], "sweep.resume=true"]
    assert alive_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-m", "engine.tokenbudget=64,128"], "error: engine.tokenbudget: no such key; did you mean "),
        (["-m", "engine=fastgen,fastgem"], "error: engine: no option named 'fastgem'; choose one of baseline, "),
        (["-m", "engine.token_budget=64,many"], "error: engine.token_budget: 'many' is no whole number; "),
        (
            ["-m", "hydra/sweeper=ax"],
            "error: hydra/sweeper: no option named 'ax'; choose one of basic, optuna, or install",
        ),
        (["-m", "parallel=[single,dp2]"], "error: parallel: no option, or several; "),
        (["-m", "engine.token_budget=range(64,"], "error: command line: "),
        (["-m", "experiment=tune", "engine=baseline"], "error: engine: baseline has no token_budget to tune; "),
        (["-m", "experiment=tune", "hydra.sweeper.n_trials=0"], "error: hydra.sweeper.n_trials: 0; give a whole "),
        (["-m", "experiment=tune", "sweep.save_as=../x"], "error: sweep.save_as: '../x'; give a name of letters, "),
        (["-m", "experiment=tune", "sweep.save_as=quickstart"], "error: sweep.save_as: quickstart is an experiment "),
        (["-m", "experiment=tune", "sweep.confirm=-1"], "error: sweep.confirm: -1; give a whole number "),
        (["-m", "experiment=tune", "sweep.confirm_rounds=0"], "error: sweep.confirm_rounds: 0; give a whole number "),
        (["-m", "experiment=tune", "sweep.least_s=-1"], "error: sweep.least_s: -1.0; give seconds from 0 "),
        (["-m", "repeat_until=fast"], "error: repeat_until: 'fast'; give a share such as 2% or 0.02, or null"),
        (["-m", "repeat_until=2"], "error: repeat_until: '2'; give a share such as 2% or 0.02, or null"),
        (["experiment=tune"], "error: experiment: a search has several jobs; add -m: "),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line(tmp_path: Path, words: list[str], line: str) -> None:
    assert_refused(answered(*words, f"results_dir={tmp_path / 'results'}"), line)
    assert not (tmp_path / "results" / "runs.csv").exists()


def test_a_sweep_whose_results_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = answered("-m", "engine.token_budget=64,128", f"results_dir={tmp_path / 'file' / 'results'}")
    assert_refused(done, f"error: results_dir: '{tmp_path / 'file' / 'results'}' cannot be written: Not a directory; ")


# --- without a launch ---


def test_a_job_is_worth_nothing_when_one_of_its_runs_failed() -> None:
    good = [SweepRun(f"r{rate}", "ok", None, rate, 1.0, 0) for rate in (10.0, 30.0, 11.0)]
    job = SweepJob(1, ["a=1"], ["a=1"], good)
    assert (job.ok, job.rate) == (True, 11.0)
    assert spread(job.rates) == "10.0 to 30.0 (181.8%)"
    assert job.interval is not None and job.interval.low < 11.0 < 30.0 < job.interval.high
    job.runs.append(SweepRun("x", "oom", "no memory", None, None, 1))
    assert (job.ok, job.rate, job.rates) == (False, 0.0, [10.0, 30.0, 11.0])
    assert SweepJob(2, [], []).rate == 0.0


@pytest.mark.parametrize(
    ("rates", "status", "finished"),
    [
        ([10.0, 10.0], "ok", False),  # too few for an interval
        ([10.0, 10.01, 10.0], "ok", True),
        ([10.0, 11.0, 10.5], "ok", False),
        ([10.0, 11.0, 10.5, 9.0], "ok", True),  # as often as it may
        ([10.0], "oom", True),
        ([], "ok", False),
    ],
)
def test_a_job_is_repeated_until_its_median_is_known(rates: list[float], status: str, finished: bool) -> None:
    runs = [SweepRun(f"r{rate}", status, None, rate, 1.0, 0) for rate in rates]
    assert SweepJob(1, [], [], runs, times=4, until=0.02).finished is finished


@pytest.mark.parametrize(
    ("runs", "elapsed_s", "status", "simulated", "finished"),
    [
        (1, 0.5, "ok", False, False),
        (6, 0.5, "ok", False, True),
        (9, 0.1, "ok", False, True),  # enough is enough
        (1, 0.5, "oom", False, True),
        (1, 0.5, "ok", True, True),
    ],
)
def test_a_short_job_is_repeated(runs: int, elapsed_s: float, status: str, simulated: bool, finished: bool) -> None:
    one = SweepRun("r", status, None, 10.0, elapsed_s, 0, simulated=simulated)
    assert SweepJob(1, [], [], [one] * runs, least_s=3.0).finished is finished


def test_a_rate_that_is_not_shown_to_be_another_one_is_marked() -> None:
    def job(number: int, rates: list[float]) -> SweepJob:
        runs = [SweepRun(f"r{rate}", "ok", None, rate, 1.0, 0, round=("s", at)) for at, rate in enumerate(rates)]
        return SweepJob(number, [], [], runs)

    best, near, far = job(1, [10.0, 11.0, 12.0]), job(2, [10.1, 10.8, 11.9]), job(3, [8.0, 8.81, 9.6])
    assert [like_the_best(one, [best, near, far]) for one in (best, near, far)] == [False, True, False]
    screen = Console(file=io.StringIO(), width=200)
    screen.print(table_of([best, near, far]))
    assert isinstance(screen.file, io.StringIO)
    assert re.findall(r" (\d+%(?: ~)?)  ", screen.file.getvalue()) == ["100%", "98% ~", "80%"]


@pytest.mark.parametrize(
    ("elapsed_s", "said"), [(0.034, "0.034 s"), (3.94, "3.9 s"), (9.97, "10 s"), (83, "1 min 23 s")]
)
def test_a_short_run_took_some_time(elapsed_s: float, said: str) -> None:
    assert run_line(SweepRun("a-run", "ok", None, 12.5, elapsed_s, 0)) == f"ok  12.5 total tokens/s in {said}  a-run"


def test_what_a_job_says_is_shown_with_one_clock(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=200)
    log = tmp_path / "launch.log"
    log.write_text("loading\n   12.3 s  3/8 requests  120 tokens\n")
    Follower(screen, "run 1 of 2", started=time.monotonic() - 75)(log)
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue() == "    run 1 of 2 1 min 15 s 3/8 requests 120 tokens\n"


def test_choices_are_values_by_key() -> None:
    assert choices(["a.b=1", "+c=x=y", "~d"]) == {"a.b": "1", "c": "x=y", "d": ""}


def test_finished_runs_are_those_whose_record_says_so(tmp_path: Path) -> None:
    assert finished_runs(str(tmp_path)) == {}
    (tmp_path / "runs.csv").write_text("run_id,status\na,ok\nb,ok\nc,failed\n../d,ok\ne,ok\n")
    for run_id, record in {
        "a": {"status": "ok", "job_hash": "h1", "total_tokens_per_s": 5.0, "elapsed_s": 2.0},
        "b": {"status": "ok"},  # of an older version
        "c": {"status": "failed", "job_hash": "h1"},
    }.items():
        (tmp_path / run_id).mkdir()
        (tmp_path / run_id / "record.json").write_text(json.dumps(record))
    assert finished_runs(str(tmp_path)) == {"h1": [SweepRun("a", "ok", None, 5.0, 2.0, 0, earlier=True)]}
