"""A run within a Slurm job that is told to end: its segment is closed, the job queued again, and the run resumed.

Slurm's ``scontrol`` is a stand-in here; test_slurm_cluster.py has the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import tables
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
    ran,
    variables,
    wait_until_begun,
)

from harness.machine.slurm import Fate, SlurmJob, current, fate_of, queue_again
from harness.running.slurm.settings import SlurmSettings, sbatch_options

# As Slurm 22.05 printed them, shortened: a job in the grace of its preemption, one that it starts again, ...
SHOWN = {
    "JobId=8 JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=2026-11-27T13:41:41": Fate.RUNNING,
    "JobId=10 JobState=COMPLETING Reason=None Requeue=1 Restarts=1": Fate.AGAIN,
    "JobId=3 JobState=PENDING Reason=BeginTime Requeue=1 Restarts=1": Fate.AGAIN,
    "JobId=7 JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0": Fate.TIME_LIMIT,
    "JobId=2 JobState=COMPLETING Reason=None Requeue=1 Restarts=0 PreemptTime=None": Fate.ENDED,
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)": Fate.UNKNOWN,
    "": Fate.UNKNOWN,
}
REQUESTS = 400
JOB = [*TINY, *RANDOM, *PACED, f"dataset.num_samples={REQUESTS}", "dataset.input_len=16", "dataset.output_len=8"]
RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts=0"


@pytest.mark.parametrize("shown", SHOWN)
def test_what_becomes_of_a_job_is_read_from_what_slurm_shows(shown: str) -> None:
    assert fate_of(shown, restarts=0) is SHOWN[shown]


def test_a_job_started_again_is_running() -> None:
    assert fate_of("JobState=RUNNING Reason=None Requeue=1 Restarts=2", restarts=2) is Fate.RUNNING


def test_the_job_of_this_process() -> None:
    assert current({}) is None
    assert current({"SLURM_JOB_ID": "12"}) == SlurmJob("12", 0)
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert current(array) == SlurmJob("12_3", 2)


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """Returns the directory of a stand-in, which shows what the file ``shown`` says and logs what else it is told."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "shown").write_text(RUNNING)
    script = f'#!/bin/sh\nif [ "$1" = show ]; then cat {place}/shown; else echo "$@" >>{place}/told; fi\n'
    (place / "scontrol").write_text(script)
    (place / "scontrol").chmod(0o755)
    return place


def in_job(scontrol: Path, restarts: int = 0) -> dict[str, str]:
    """Returns what Slurm adds to the environment of a job."""
    path = f"{scontrol}:{variables()['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts)}


def told(results: Path, signum: int, *overrides: str, **more: str) -> Run:
    """Runs the job and signals it when some requests are finished."""
    line = command(*JOB, *overrides, f"results_dir={results}", launcher=(sys.executable,))
    process = begun(line, environment=variables(**more))
    wait_until_begun(results, process, size=2000)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=120)
    return Run(process.returncode, stdout, stderr, results)


def test_sigusr1_pauses_a_run_anywhere(tmp_path: Path) -> None:
    run = told(tmp_path, signal.SIGUSR1)
    assert run.status == 75
    assert (run.row["status"], run.row["error"]) == ("interrupted", "paused by SIGUSR1")
    assert 0 < len(run.completions) < REQUESTS
    assert "Traceback" not in run.stderr


def test_a_job_that_is_preempted_is_queued_again_and_resumes_its_run(tmp_path: Path, scontrol: Path) -> None:
    results = tmp_path / "results"
    first = told(results, signal.SIGTERM, "requeue=true", **in_job(scontrol))
    assert first.status == 75, first.stderr
    assert first.row["error"] == "paused by SIGTERM"
    assert (scontrol / "told").read_text() == "requeue 12\n"
    assert f"Slurm starts job 12 again, which resumes run {first.row['run_id']}" in first.stdout
    before = len(first.completions)
    assert before < REQUESTS

    job = [*JOB, "engine.pace=0", "requeue=true"]
    (scontrol / "shown").write_text(RUNNING.replace("Restarts=0", "Restarts=1"))
    second = ran(results, *job, **in_job(scontrol, restarts=1))
    assert second.status == 0, second.stderr
    assert f"job 12 was queued again: its run {first.row['run_id']} is resumed" in second.stdout
    assert (second.row["run_id"], second.row["status"]) == (first.row["run_id"], "ok")
    assert sorted(second.completions) == list(range(REQUESTS))
    assert [segment["completed"] for segment in second.record["segments"]] == [before, REQUESTS - before]

    third = ran(results, *job, **in_job(scontrol, restarts=2))
    assert third.status == 0
    assert third.stdout == f"job 12 was queued again, but its run {first.row['run_id']} is complete\n"
    assert len(third.rows) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "shown, status, error, exit_status",
    [
        (RUNNING.replace("RUNNING", "COMPLETING"), "interrupted", "its Slurm job 12 was cancelled", 130),
        (
            RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit"),
            "timeout",
            "not finished within the time limit of its Slurm job 12; raise --time",
            1,
        ),
    ],
)
def test_a_job_that_is_cancelled_or_out_of_time_is_not_queued_again(
    tmp_path: Path, scontrol: Path, shown: str, status: str, error: str, exit_status: int
) -> None:
    (scontrol / "shown").write_text(shown)
    run = told(tmp_path / "results", signal.SIGTERM, "requeue=true", **in_job(scontrol))
    assert (run.row["status"], run.row["error"], run.status) == (status, error, exit_status)
    assert not (scontrol / "told").exists()


def test_a_second_segment_in_a_row_that_finished_nothing_is_the_last() -> None:
    said = queue_again(SlurmJob("12"), {"segments": [{"completed": 5}, {"completed": 0}]})
    assert said == "no request was finished since its last start; give it more time"


@pytest.mark.slow
def test_two_ranks_that_slurm_signals_all_at_once_are_one_pause(tmp_path: Path, scontrol: Path) -> None:
    results = tmp_path / "results"
    job = [*TINY, *RANDOM, "dataset.num_samples=20000", "dataset.input_len=16", "dataset.output_len=80"]
    line = command(*job, "parallel.dp=2", "requeue=true", f"results_dir={results}", launcher=deepspeed(2))
    process = begun(line, environment=variables(**in_job(scontrol)), process_group=0)
    wait_until_begun(results, process, size=2000)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    run = Run(process.returncode, "", "", results)
    assert run.row["status"] == "interrupted"
    assert "paused by SIGTERM" in run.row["error"]
    assert (scontrol / "told").read_text() == "requeue 12\n"


def test_requeue_without_a_job_is_refused() -> None:
    said = answered(*SIMULATED, "requeue=true")
    assert_refused(said, "error: requeue: true, and this is no Slurm job; start it with sbatch")


def test_requeue_of_several_runs_is_refused(scontrol: Path) -> None:
    said = answered(*SIMULATED, "requeue=true", "repeat=2", **in_job(scontrol))
    assert_refused(said, "error: requeue: true with repeat or sweep.resume")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "error: hydra.launcher.gpus_per_node: not set; give the GPUs of a node, or 0"),
        (["hydra.launcher.gpus_per_node=-1"], "error: hydra.launcher.gpus_per_node: -1; "),
        (["hydra.launcher.gpus_per_node=many"], "error: hydra.launcher.gpus_per_node: 'many' is no whole number; "),
        (["hydra.launcher.gpus_per_nodes=8"], "error: hydra.launcher.gpus_per_nodes: no such key; "),
        (["hydra.launcher.gpus_per_node=8", "hydra.launcher.time='1 h'"], "error: hydra.launcher.time: '1 h'; "),
    ],
)
def test_what_no_cluster_takes_is_refused_in_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    said = answered("-m", "hydra/launcher=slurm", *words, *SIMULATED, f"results_dir={tmp_path / 'results'}")
    assert_refused(said, line)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_slurm_and_a_run_without_m_are_told(tmp_path: Path) -> None:
    words = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", *SIMULATED, f"results_dir={tmp_path}"]
    assert_refused(
        answered("-m", *words, PATH=str(tmp_path)), "error: hydra/launcher: slurm: there is no sbatch on this"
    )
    assert_refused(answered(*words), "error: hydra/launcher: slurm is for the jobs of a sweep; add -m")


def test_the_script_that_slurm_gets() -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    asked = SlurmSettings(gpus_per_node=8, nodes=4, time="1-12:00:00", account="mine", cpus_per_node=64)
    text = _make_sbatch_string("run it", "/results/%j", **sbatch_options(asked))
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"gpus-per-node=8", "nodes=4", "ntasks-per-node=1", "time=1-12:00:00", "account=mine", "requeue"} <= flags
    assert "signal=USR1@120" in flags and not any(flag.startswith(("wckey", "partition")) for flag in flags)
    assert "export DS_ACCELERATOR=cuda" in text and "--kill-on-bad-exit=0" in text and "--cpus-per-task=64" in text
    plain = sbatch_options(SlurmSettings(gpus_per_node=0, requeue=False))
    text = _make_sbatch_string("run it", "/results/%j", **plain)
    assert "export DS_ACCELERATOR=cpu" in text and "--no-requeue" in text and "USR1" not in text
    assert "gpus" not in text and "--time" not in text


def test_the_settings_are_documented_with_their_defaults() -> None:
    (table,) = [rows for heading, rows in tables(ROOT / "conf" / "README.md") if heading == "Sweeps on Slurm"]
    found = {name.strip("`"): json.loads(default.strip("`")) for name, _, default, _ in table[1:]}
    settings = dataclasses.asdict(SlurmSettings())
    assert found == {name: value for name, value in settings.items() if name != "_target_"}


def test_a_job_without_gpus_is_refused(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch")]
    bare = {name: value for name, value in variables().items() if name not in ("DS_ACCELERATOR", "SLOTS")}
    said = subprocess.run(script, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert_refused(said, "error: gpus-per-node: this job has no GPUs; sbatch --gpus-per-node N ...")
