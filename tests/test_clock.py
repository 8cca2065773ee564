"""Times and ends that no rank wrote down: runs that are stopped, killed, resumed twice at once, or lose their files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.resuming import REQUESTS, begin, check_sums, family, has_lines, kill, run_id_in, wait_for, watchdogs
from support.runs import PACED, ROOT, Run, begun, command, deepspeed, ended, ranks_of, start

from harness.results import lifeline, segments
from harness.results.closing import close_unfinished
from harness.results.directory import read_record
from harness.results.lock import LAUNCH_LOCK, LOCK, RunLock, holder
from harness.results.recorder import RunRecorder
from harness.results.table import read_rows
from harness.running import watch
from harness.workload.records import Completion

Harness = Callable[..., Run]

STOPPED_S = 6.0
BARE = "--log_level", "critical"
ID = "20260101-000000-fastgen-0001"


def stopped_and_killed(results: Path, ranks: int, victim: str) -> str:
    """Runs, stops rank 0 for :data:`STOPPED_S`, and kills it or everything; ``ranks`` of a bare launch, 0 of ours."""
    launcher = deepspeed(ranks, *BARE) if ranks else (sys.executable,)
    process = begin(results, launcher=launcher, forked=victim != "all")  # a fork's watchdog is not found by its words
    assert wait_for(process, partial(has_lines, results, 3))
    run_id = run_id_in(results)
    assert run_id is not None
    family(process)["rank 0"].send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_S)
    if victim == "all":
        for witness in watchdogs(run_id):
            witness.kill()
    kill(process, victim)
    process.wait(timeout=120)
    for witness in watchdogs(run_id):
        witness.wait(30)
    return run_id


ONE_OR_BARE = pytest.mark.parametrize("ranks", [0, pytest.param(1, marks=pytest.mark.full)], ids=["ours", "bare"])


@pytest.mark.slow
@ONE_OR_BARE
def test_the_time_that_a_killed_rank_was_stopped_counts(tmp_path: Path, harness: Harness, ranks: int) -> None:
    results, began = tmp_path / "results", time.monotonic()
    run_id = stopped_and_killed(results, ranks, "rank 0")
    took, sign = time.monotonic() - began, segments.last_sign_of_life(results / run_id)
    run = harness(f"resume={run_id}", results=results)
    assert (run.status, run.row["completed"]) == (0, str(REQUESTS)), run.stderr
    first, second = run.record["segments"]
    assert sign is not None and sign + STOPPED_S <= first["elapsed_s"] <= took
    assert first["status"] == "failed" and not first["elapsed_is_estimated"]
    assert first["clock_to_s"] == second["clock_from_s"]
    assert "at least" not in run.record["notes"][-1] and not run.record["elapsed_is_estimated"]
    check_sums(run)
    print(f"last sign {sign:.2f} s, then {STOPPED_S} s stopped: {first['elapsed_s']:.2f} s")


@pytest.mark.slow
@ONE_OR_BARE
def test_where_nobody_saw_the_end_its_time_is_a_bound(tmp_path: Path, harness: Harness, ranks: int) -> None:
    results = tmp_path / "results"
    run_id = stopped_and_killed(results, ranks, "all")
    record = read_record(results, run_id)
    assert record is not None and record["status"] == "running"
    sign = segments.last_sign_of_life(results / run_id)
    run = harness(f"resume={run_id}", results=results)
    assert (run.status, run.row["completed"]) == (0, str(REQUESTS)), run.stderr
    first = run.record["segments"][0]
    assert sign is not None
    # The witness was seen alive a second before, or on a busy machine two.
    assert sign + STOPPED_S - 2 <= first["elapsed_s"] <= first["elapsed_at_most_s"]
    assert first["elapsed_is_estimated"] and run.record["elapsed_is_estimated"]
    assert "nobody saw one of them end: elapsed_s is at least" in run.record["notes"][-1]
    assert "at most" in run.stdout and "in at least" in " ".join(run.stdout.split())
    check_sums(run)


# --- what the files say ---


def crashed(directory: Path, clock_s: float = 10.0, completed_s: float = 9.0) -> dict[str, Any]:
    """Leaves a run that was killed at ``clock_s``; returns what its ``run.clock`` says."""
    recorder = RunRecorder.create(directory, ID, {}, [])
    recorder.clock_started(clock_s)
    recorder.add(Completion(0, 1, 1, "length", [7], "", completed_s, completed_s, None))
    return json.loads((directory / ID / lifeline.NAME).read_text().split("\n")[0])


def taken_up(directory: Path) -> dict[str, Any]:
    recorder = RunRecorder.resume(directory, ID, {}, [])
    recorder.note()
    recorder.release()
    return recorder.record["segments"][-1]


def rewrite(directory: Path, noted: dict[str, Any], moment: str | None = None) -> None:
    path = directory / ID / lifeline.NAME
    path.write_text(json.dumps(noted) + "\n" + (moment or path.read_text().split("\n")[1]) + "\n")


def test_a_death_that_was_seen_is_the_end(tmp_path: Path) -> None:
    noted = crashed(tmp_path)
    rewrite(tmp_path, noted, f"gone {noted['zero_s'] + 60:020.3f}")
    segment = taken_up(tmp_path)
    assert segment["elapsed_s"] == pytest.approx(60, abs=0.01) and not segment["elapsed_is_estimated"]
    assert not (tmp_path / ID / lifeline.NAME).exists()


def test_no_end_is_before_the_last_sign(tmp_path: Path) -> None:
    noted = crashed(tmp_path, completed_s=70.0)
    rewrite(tmp_path, noted, f"gone {noted['zero_s'] + 60:020.3f}")
    assert taken_up(tmp_path)["elapsed_s"] == 70


def test_the_same_boot_gives_an_upper_bound_and_another_none(tmp_path: Path) -> None:
    crashed(tmp_path / "same")
    segment = taken_up(tmp_path / "same")
    assert segment["elapsed_is_estimated"]
    assert 9.999 <= segment["elapsed_s"] < segment["elapsed_at_most_s"] < 15
    noted = crashed(tmp_path / "other")
    rewrite(tmp_path / "other", noted | {"boot": "another"})
    segment = taken_up(tmp_path / "other")
    assert segment["elapsed_is_estimated"] and segment["elapsed_at_most_s"] is None
    assert segment["elapsed_s"] >= 9.999


def test_a_record_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    crashed(tmp_path)
    (tmp_path / ID / lifeline.NAME).unlink()
    path = tmp_path / ID / "record.json"
    record = json.loads(path.read_text())
    del record["clock_boot"]
    path.write_text(json.dumps(record))
    segment = taken_up(tmp_path)
    assert (segment["elapsed_s"], segment["elapsed_is_estimated"], segment["elapsed_at_most_s"]) == (9, True, None)
    old = {"elapsed_s": 3.0, "elapsed_is_estimated": True}
    assert "about 3.0 s + at least 9.0 s; nobody saw" in segments.note({"segments": [old, segment]})


def test_a_run_that_died_before_its_clock_took_no_time(tmp_path: Path) -> None:
    RunRecorder.create(tmp_path, ID, {}, [])
    segment = taken_up(tmp_path)
    assert (segment["elapsed_s"], segment["elapsed_is_estimated"]) == (0, False)
    # What another segment has left behind says nothing of this one.
    (tmp_path / ID / lifeline.NAME).write_text(
        json.dumps({"boot": lifeline.boot(), "pid": 1, "segment": 0, "zero_s": 0.0}) + f"\ngone {99:020.3f}\n"
    )
    segment = taken_up(tmp_path)
    assert (segment["elapsed_s"], segment["elapsed_is_estimated"]) == (0, False)


def test_a_witness_writes_until_the_end_and_not_into_a_file_that_was_taken_away(tmp_path: Path) -> None:
    witness = lifeline.Witness(tmp_path)
    witness.look()
    assert not (tmp_path / lifeline.NAME).exists()
    words = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv[1]); from harness.results import lifeline as l",
    ]
    words[-1] += "; from pathlib import Path; l.begun(Path(sys.argv[2]), 0, 0.0); print(flush=True); input()"
    child = subprocess.Popen([*words, str(ROOT), str(tmp_path)], stdin=-1, stdout=-1)
    assert child.stdout is not None and child.stdout.readline()
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    witness.look()
    life = lifeline.read(tmp_path)
    assert life is not None and life.pid == child.pid and not life.gone and life.until_s >= 0.5
    child.kill()
    child.wait()
    witness.look()
    life = lifeline.read(tmp_path)
    assert life is not None and life.gone and witness.gone
    content = (tmp_path / lifeline.NAME).read_bytes()
    lifeline.Witness(tmp_path).look()  # a second witness does not move the end
    assert (tmp_path / lifeline.NAME).read_bytes() == content
    lifeline.forget(tmp_path)
    lifeline.Witness(tmp_path).gone_now()
    assert not (tmp_path / lifeline.NAME).exists()


# --- two that resume one run ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "launchers",
    [*(pytest.param(both, marks=pytest.mark.full) for both in ((0, 0), (1, 1))), (0, 1)],
    ids=["ours", "bare", "both"],
)
def test_of_two_that_resume_at_once_one_is_refused(tmp_path: Path, launchers: tuple[int, int]) -> None:
    process = start(tmp_path, *PACED)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    run_id = run_id_in(tmp_path)
    assert run_id is not None
    before = len((tmp_path / run_id / "completions.jsonl").read_bytes().splitlines())
    both = []
    for ranks in launchers:
        launcher = deepspeed(ranks, *BARE) if ranks else (sys.executable,)
        line = command(f"resume={run_id}", f"results_dir={tmp_path}", launcher=launcher)
        both.append(begun(line))
    deadline = time.monotonic() + 300
    while all(each.poll() is None for each in both) and time.monotonic() < deadline:
        time.sleep(0.1)
    (refused,) = (each for each in both if each.poll() is not None)
    (going,) = (each for each in both if each.poll() is None)
    _, stderr = refused.communicate(timeout=60)
    rank = ranks_of(going)[0]
    lines = [line for line in stderr.splitlines() if line]
    assert lines == [f"error: resume: {run_id} is still being run (process {rank.pid}); wait for it, or end it first"]
    assert refused.returncode == 2
    (rank if launchers[both.index(going)] else going).send_signal(signal.SIGINT)
    _, stderr = going.communicate(timeout=120)
    assert going.returncode == 130, stderr
    assert stderr.count("error: ") == 1
    record = read_record(tmp_path, run_id)
    assert record is not None
    assert [part["status"] for part in record["segments"]] == ["interrupted", "interrupted"]
    first, second = (part["completed"] for part in record["segments"])
    assert (first, record["completed"]) == (before, first + second)
    (row,) = read_rows(tmp_path / "runs.csv")
    assert (row["status"], row["completed"]) == ("interrupted", str(first + second))


def test_a_rank_does_not_take_over_what_another_launch_has_begun(tmp_path: Path) -> None:
    RunRecorder.create(tmp_path, ID, {}, []).note(launcher=["here", 1])
    with pytest.raises(Exception, match="is another launch's by now"):
        RunRecorder.create(tmp_path, ID, {}, [], hold=True, launcher=["here", 2])
    RunRecorder.create(tmp_path, ID, {}, [], hold=True, launcher=["here", 1]).release()


def test_the_holder_of_a_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = RunLock(tmp_path), RunLock(tmp_path)
    assert holder(tmp_path / LOCK) is None
    one.hold(LAUNCH_LOCK, LOCK)
    assert holder(tmp_path / LOCK) == os.getpid()
    one.release(LOCK)
    assert holder(tmp_path / LOCK) is None and holder(tmp_path / LAUNCH_LOCK) == os.getpid()
    monkeypatch.setattr("harness.results.lock.LOCK_TIMEOUT_S", 0.1)
    with pytest.raises(Exception, match=rf"is still being run \(process {os.getpid()}\); wait for it"):
        two.hold(LAUNCH_LOCK, LOCK)
    one.release()
    two.hold(LAUNCH_LOCK, LOCK)
    two.release()


# --- files that go away ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "what"),
    [(0, "run"), *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, "results"), (2, "run")))],
)
def test_a_run_whose_directory_is_deleted_ends(tmp_path: Path, ranks: int, what: str) -> None:
    results = tmp_path / "results"
    launcher = deepspeed(ranks, *BARE) if ranks else (sys.executable,)
    simulated = PACED if ranks < 2 else []
    process = start(results, *simulated, f"parallel.dp={max(ranks, 1)}", launcher=launcher)
    run_id = run_id_in(results)
    assert run_id is not None
    (results / run_id if what == "run" else results).rename(tmp_path / "away")  # at once, unlike rmtree
    shutil.rmtree(tmp_path / "away")
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 2
    lines = [line for line in stderr.splitlines() if line.startswith("error: ") and "rank 1" not in line]
    assert lines == [
        f"error: {results}/{run_id}: was deleted or moved during the run; "
        f"if it was moved, move it back: resume={run_id} does the rest; if not, start a new run"
    ]
    assert "Traceback" not in stderr
    assert not (results / run_id).exists()
    assert what == "run" or not results.exists()
    print(f"noticed and ended within {took:.1f} s")


def test_a_file_that_is_replaced_is_not_written_past(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, ID, {}, [])
    assert recorder.gone() is None
    recorder.add(Completion(0, 1, 1, "length", [7], "", 1.0, 1.0, None))
    assert recorder.gone() is None
    path = tmp_path / ID / "completions.jsonl"
    path.rename(tmp_path / "kept")
    path.write_bytes((tmp_path / "kept").read_bytes())
    gone = recorder.gone()
    assert gone is not None and str(gone).startswith(f"{path}: was deleted or moved during the run; ")
    row = recorder.finish("ok", elapsed_s=1.0)
    assert (row["status"], row["error"]) == ("failed", str(gone))


def test_nothing_is_made_anew_where_a_directory_was(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path / "results", ID, {}, [])
    recorder.add(Completion(0, 1, 1, "length", [7], "", 1.0, 1.0, None))
    shutil.rmtree(tmp_path / "results")
    with pytest.raises(Exception, match="was deleted or moved during the run"):
        recorder.finish("ok", elapsed_s=1.0)
    assert close_unfinished(tmp_path / "results", ID, "failed", "killed") is None
    assert not (tmp_path / "results").exists()


# --- ranks that are stopped when the time is over ---


ALONE = ["parallel.dp=1", *PACED]
LONG = "dataset.output_len=64"  # so that two ranks are at it for minutes
QUEUE, COLLECTIVE = ["parallel.dp=2", LONG], ["parallel.tp=2", "engine.kernels=torch", LONG]


def begun_in_time(
    directory: Path, *overrides: str, launcher: tuple[str, ...]
) -> tuple[subprocess.Popen[str], Path, int]:
    """Starts a run with a time limit that leaves it time to load on this machine; returns it, its results, the limit.

    The limit counts from before loading, which takes two ranks 10 s, and more than a minute beside other tests.
    """
    for timeout_s in (10, 30, 90) if ALONE[0] in overrides else (45, 90, 270):
        results = directory / str(timeout_s)
        try:
            return start(results, f"timeout_s={timeout_s}", *overrides, launcher=launcher), results, timeout_s
        except AssertionError as over:
            if f"not finished after timeout_s={timeout_s}" not in str(over):
                raise
    raise AssertionError("no time limit left it time to load")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "overrides", "bare"),
    [
        (0, ALONE, False),
        pytest.param(0, QUEUE, False, marks=pytest.mark.full),
        (1, QUEUE, False),
        pytest.param(1, COLLECTIVE, False, marks=pytest.mark.full),
        pytest.param(0, ALONE, True, marks=pytest.mark.full),
        pytest.param(1, QUEUE, True, marks=pytest.mark.full),
    ],
    ids=["alone", "rank 0 of 2", "rank 1 of 2", "rank 1 of a model's 2", "alone, bare", "rank 1 of 2, bare"],
)
def test_a_stopped_rank_does_not_outlive_its_time(
    tmp_path: Path, victim: int, overrides: list[str], bare: bool
) -> None:
    ranks = 1 if overrides is ALONE else 2
    launcher = deepspeed(ranks, *BARE) if bare else (sys.executable,)
    process, results, timeout_s = begun_in_time(tmp_path, *overrides, launcher=launcher)
    # Rank 0 writes it just before its own timer starts.
    timer = next(results.glob("*/config.yaml")).stat().st_mtime
    ranks_of(process)[victim].send_signal(signal.SIGSTOP)
    status, stderr, row = ended(process, results, timeout_s + 60)
    late_s = time.time() - timer - timeout_s
    assert -1 < late_s < 30  # 32 s at least where nobody continues it, on an idle machine; this one may be busy
    assert row["status"] == "timeout" and f"timeout_s={timeout_s}" in row["error"]
    assert status == 1
    assert "Traceback" not in stderr
    assert f"resume={row['run_id']} does the rest" in stderr
    record = read_record(results, row["run_id"])
    assert record is not None and record["clock_s"] > 0  # its own clock: it had its say
    print(f"{late_s:.1f} s late")


@pytest.mark.slow
def test_ctrl_c_reaches_a_stopped_rank(tmp_path: Path) -> None:
    process = start(tmp_path, "parallel.dp=2")
    ranks_of(process)[0].send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, stderr, row = ended(process, tmp_path)
    assert (status, row["status"]) == (130, "interrupted")
    *others, last, command = stderr.splitlines()
    assert last.startswith("error: interrupted (what was finished is in ")
    assert command.endswith(f"resume={row['run_id']}")
    assert set(others) <= {"error: rank 1: interrupted"}  # which nobody has told why, while rank 0 was stopped


def test_a_rank_that_is_stopped_again_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "60"])
    rank, sleepers = psutil.Process(child.pid), watch.Sleepers()
    sleepers.wake([rank])
    assert child.poll() is None and not sleepers.killed
    for killed in (False, True):
        rank.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while rank.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        sleepers.wake([rank])
        assert sleepers.killed == killed
        monkeypatch.setattr(watch, "AGAIN_S", 0.0)
    assert child.wait(10) == -signal.SIGKILL
    sleepers.wake([rank])
