"""Runs and sweeps on a real Slurm of one node, which the tests start and end themselves; with --full, as root."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import PACED, RANDOM, ROOT, TINY, Run, begun, command, ran, variables
from support.slurm import Slurm, why_not

ODD = ROOT / "tests" / "support" / "odd"
SMALL = [*TINY, *RANDOM, "dataset.input_len=16", "dataset.output_len=8"]
JOBS = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.poll_s=0.5"]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Yields the cluster, below a directory that everybody can reach."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as place:
        cluster = Slurm(Path(place))
        yield cluster
        cluster.end()


def sweep(slurm: Slurm, results: Path, *words: str, **more: str) -> Run:
    """Runs a sweep whose jobs are Slurm's."""
    return ran(results, "-m", *JOBS, *words, cold=True, **slurm.environment, **more)


def started(slurm: Slurm, results: Path, *words: str) -> subprocess.Popen[str]:
    """Starts such a sweep."""
    line = command("-m", *JOBS, *words, f"results_dir={results}", launcher=(sys.executable,))
    return begun(line, environment=variables(**slurm.environment))


def wait_for_requests(slurm: Slurm, results: Path, lines: int, within_s: float = 240.0) -> Path:
    """Waits until a run has finished so many requests; returns its directory."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for path in results.glob("*/completions.jsonl"):
            if path.read_bytes().count(b"\n") >= lines:
                return path.parent
        time.sleep(0.2)
    raise AssertionError(slurm.log())


def test_a_sweep_of_six_jobs_of_which_one_fails_and_one_is_out_of_time(slurm: Slurm, tmp_path: Path) -> None:
    installed = tmp_path / "site" / "odd_engine-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-engine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[harness.engines]\nodd = odd_engine.room:ROOM\n")
    odd = {"PYTHONPATH": f"{installed.parent}:{ODD}", "ODD_MENDED": str(tmp_path / "mended")}
    job = [*SMALL, "dataset.num_samples=3", "engine=odd", f"hydra.searchpath=[file://{ODD / 'conf'}]"]
    job += ["hardware=h100_80g", "dataset.seed=1,2,3,4,5,9", "hydra.launcher.time=1", "hydra.launcher.requeue=false"]
    results = tmp_path / "results"
    first = sweep(slurm, results, *job, **odd)
    assert first.status == 1, first.stdout + first.stderr
    assert "4 of 6 jobs ok" in first.stdout
    assert "submitted 6 runs to Slurm" in first.stdout
    errors = {row["status"]: row["error"] for row in first.rows}
    assert sorted(row["status"] for row in first.rows) == ["failed", *["ok"] * 4, "timeout"]
    assert "SIGABRT" in errors["failed"]
    assert "time limit" in errors["timeout"]
    assert "Traceback" not in first.stdout + first.stderr

    (tmp_path / "mended").touch()
    again = sweep(slurm, results, *job, "sweep.resume=true", **odd)
    assert again.status == 0, again.stdout + again.stderr
    assert again.stdout.count("(ran before)") == 4
    assert "submitted 2 runs to Slurm" in again.stdout
    assert [row["status"] for row in again.rows[6:]] == ["ok", "ok"]


def test_a_run_that_is_preempted_twice_does_each_request_once(slurm: Slurm, tmp_path: Path) -> None:
    results, requests = tmp_path / "results", 300
    # Small passes, so that some thousands of them take a while on any machine.
    job = [*SMALL, f"dataset.num_samples={requests}", "dataset.output_len=64", "engine.max_sequences=4"]
    log = tmp_path / "job.out"
    script = ["sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", str(ROOT / "launch" / "slurm.sbatch")]
    number = slurm.run(*script, *job, f"results_dir={results}", PYTHON=sys.executable, OMP_NUM_THREADS="1")
    done = 0
    for _ in range(2):
        directory = wait_for_requests(slurm, results, done + 4)
        other = ["--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        urgent = slurm.run("sbatch", "--parsable", *other)
        slurm.wait_for_the_end(urgent)
        done = (directory / "completions.jsonl").read_bytes().count(b"\n")
        assert done < requests
    slurm.wait_for_the_end(number, within_s=1200)
    run = Run(0, log.read_text(), "", results)
    assert run.row["status"] == "ok", run.stdout
    segments = run.record["segments"]
    assert len(segments) == 3
    assert sum(segment["completed"] for segment in segments) == requests
    assert all(segment["completed"] > 0 for segment in segments)
    assert run.stdout.count(f"Slurm starts job {number} again") == 2
    whole = ran(tmp_path / "whole", *job, OMP_NUM_THREADS="1")
    assert run.token_ids == whole.token_ids  # each request once, or token_ids had said so
    assert slurm.run("squeue", "--noheader") == ""


def test_a_job_of_a_sweep_is_queued_again_and_followed_to_its_end(slurm: Slurm, tmp_path: Path) -> None:
    process = started(slurm, tmp_path, *SMALL, *PACED, "dataset.num_samples=40,1500")
    directory = wait_for_requests(slurm, tmp_path, 60)
    (name,) = [path.stem for path in (tmp_path / ".slurm").glob("*.run") if path.read_text().strip() == directory.name]
    slurm.run("scancel", "--signal=USR1", name)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stdout + stderr
    assert "2 of 2 jobs ok" in stdout
    runs = Run(0, stdout, stderr, tmp_path)
    assert [row["status"] for row in runs.rows] == ["ok", "ok"]
    log = (tmp_path / ".slurm" / name / f"{name}_0_log.out").read_text()
    assert f"Slurm starts job {name} again, which resumes run {directory.name}" in log


def test_ctrl_c_cancels_what_is_left_and_the_last_line_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    words = [*SMALL, *PACED, "engine.max_sequences=8", "dataset.num_samples=30,31,100000,100001,100002,100003"]
    process = started(slurm, tmp_path, *words)
    wait_for_requests(slurm, tmp_path, 60)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stdout + stderr
    assert "Slurm jobs\n" in stdout and stderr == "error: interrupted\n"
    last = shlex.split(stdout.splitlines()[-1])
    assert last[:2] == ["python", "harness/main.py"] and last[-1] == "sweep.resume=true"
    for _ in range(100):
        if slurm.run("squeue", "--noheader") == "":
            break
        time.sleep(0.5)
    assert slurm.run("squeue", "--noheader") == ""
    ended = Run(130, stdout, stderr, tmp_path)
    cancelled = [row for row in ended.rows if row["status"] == "interrupted"]
    assert cancelled and all("was cancelled" in row["error"] for row in cancelled)
    shorter = [word.replace(",100000,100001,100002,100003", "") for word in last[2:]]
    again = ran(tmp_path, *shorter, cold=True, **slurm.environment)
    assert again.status == 0, again.stdout + again.stderr
    assert "2 of 2 jobs ok" in again.stdout and again.stdout.count("(ran before)") == 2


def test_the_jobs_of_a_sweep_that_was_killed_are_followed_by_the_next(slurm: Slurm, tmp_path: Path) -> None:
    words = [*SMALL, *PACED, "engine.pace=400", "engine.max_sequences=16", "dataset.num_samples=300,301"]
    process = started(slurm, tmp_path, *words)
    wait_for_requests(slurm, tmp_path, 20)
    process.kill()
    process.communicate()
    again = sweep(slurm, tmp_path, *words, "sweep.resume=true")
    assert again.status == 0, again.stdout + again.stderr
    assert "submitted" not in again.stdout and "(ran before)" not in again.stdout
    assert "2 of 2 jobs ok" in again.stdout
    assert [row["status"] for row in again.rows] == ["ok", "ok"]


def test_a_job_that_never_began_and_what_sbatch_refuses_are_one_line(slurm: Slurm, tmp_path: Path) -> None:
    refused = sweep(slurm, tmp_path, *SMALL, *PACED, "dataset.num_samples=4,5", "hydra.launcher.partition=nowhere")
    assert refused.status == 2
    assert refused.stderr == (
        "error: hydra.launcher: sbatch: invalid partition specified: nowhere; "
        "change hydra.launcher.* to what the cluster has\n"
    )
    broken = sweep(slurm, tmp_path, *SMALL, *PACED, "dataset.num_samples=4", "hydra.launcher.setup=['exit 3']")
    assert broken.status == 1
    assert "ended before its run began" in broken.stdout and "Traceback" not in broken.stdout + broken.stderr
