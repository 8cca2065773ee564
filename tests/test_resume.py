"""Runs that are ended early, by all that can end one, and resumed: nothing lost or twice, the same tokens."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from support.in_process import answered
from support.resuming import (
    REQUESTS,
    begin,
    check,
    complete_lines,
    family,
    finished,
    has_lines,
    interrupt,
    kill,
    passed,
    run_id_in,
    wait_for,
    work,
)
from support.runs import (
    PACED,
    RANDOM,
    ROOT,
    SIMULATED,
    TINY,
    Run,
    assert_refused,
    begun,
    check_against_ids,
    command,
    deepspeed,
    python,
    ran,
    ranks_of,
    start,
)

from harness.basics.errors import UserError
from harness.config.identity import config_hash
from harness.engines.catalogue import register
from harness.ranks.rank import Rank
from harness.results import segments
from harness.results.closing import close_unfinished
from harness.results.completions import read_completions
from harness.results.directory import read_record
from harness.results.lock import LOCK
from harness.results.recorder import RunRecorder
from harness.results.table import read_rows
from harness.running import resume
from harness.workload.records import Completion

Harness = Callable[..., Run]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the run that nothing interrupts."""
    run = ran(tmp_path_factory.mktemp("whole"), *work())
    assert (run.status, len(run.completions)) == (0, REQUESTS), run.stderr
    return run


VICTIMS = (
    ("rank 0", 1, False),
    ("rank 1", 2, False),
    ("launcher", 2, False),
    ("all", 2, False),
    ("deepspeed", 2, False),
    ("rank 0", 2, False),
    ("rank 0", 2, True),
    ("launcher", 2, True),
    ("deepspeed", 2, True),
)


@pytest.mark.slow
@pytest.mark.endurance
def test_killed_at_random_moments_and_resumed_a_run_is_the_one_that_was_never_killed(
    tmp_path: Path, whole: Run, harness: Harness, scale: Callable[[int, int], int]
) -> None:
    count = scale(2, 30)
    chance = random.Random(20261124)
    killed, told = 0, []
    for trial in range(3 * count):
        if killed >= count:
            break
        victim, replicas, bare = VICTIMS[trial % len(VICTIMS)]
        results = tmp_path / f"trial{trial}"
        launcher = deepspeed(replicas) if bare else (sys.executable,)
        any_moment = trial % 3 == 2
        forked = not (bare or any_moment)  # a fork's start has few moments, and a bare launcher is not its parent
        process = begin(results, f"parallel.dp={replicas}", launcher=launcher, forked=forked)
        if any_moment:  # the import, the load, the warm-up, or the run
            struck = wait_for(process, partial(passed, time.monotonic() + chance.uniform(1.0, 20.0)))
        else:
            struck = wait_for(process, partial(has_lines, results, chance.randrange(REQUESTS)))
            time.sleep(chance.uniform(0, 0.3))
        if struck:
            kill(process, victim)
        process.wait(timeout=120)
        run_id = run_id_in(results)
        record = None if run_id is None else read_record(results, run_id)
        if not struck or run_id is None or record is None or record["status"] == "ok":
            continue  # too late, or before there was a run
        before = complete_lines(results / run_id / "completions.jsonl")
        if trial % 4 == 1:  # the second attempt is killed too
            second = begin(results, words=[f"resume={run_id}"])
            wait_for(second, partial(has_lines, results, chance.randrange(before.count(b"\n"), REQUESTS) + 1))
            kill(second, chance.choice(["rank 0", "launcher"]))
            second.wait(timeout=120)
        record = read_record(results, run_id)
        if record is not None and record["status"] != "ok":
            run = harness(f"resume={run_id}", results=results)
        if record is None or record["status"] == "ok" or "is complete" in run.stderr:
            run = Run(0, "", "", results)  # ranks have a second to hear that their launcher is dead: they were done
            if "segments" not in run.record:
                assert run.token_ids == whole.token_ids
                continue
        killed += 1
        told.append((trial, victim, replicas, bare, before.count(b"\n")))
        assert (results / run_id / "completions.jsonl").read_bytes().startswith(before), told[-1]
        check(run, whole)
    assert killed == count
    print(*told, sep="\n")


def test_a_torn_last_line_is_cut_off_and_its_request_run_again(tmp_path: Path, whole: Run, harness: Harness) -> None:
    results = tmp_path / "results"
    process = begin(results)
    assert wait_for(process, lambda: finished(results) >= 5)
    kill(process, "all")
    process.wait(timeout=60)
    run_id = run_id_in(results)
    assert run_id is not None
    path = results / run_id / "completions.jsonl"
    lines = complete_lines(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    run = harness(f"resume={run_id}", results=results)
    check(run, whole)
    assert path.read_bytes().startswith(b"".join(lines[:-1]))
    torn = json.loads(lines[-1])["index"]
    assert torn in [line["index"] for line in read_completions(path)[len(lines) - 1 :]]
    assert_refused(resumed(results, f"resume={run_id}"), f"error: resume: {run_id} is complete; ")
    check(run, whole)


@pytest.mark.slow
def test_a_run_that_split_its_ranks_itself_does_so_again(tmp_path: Path, whole: Run, harness: Harness) -> None:
    results = tmp_path / "results"
    process = begin(results, launcher=deepspeed(2))
    assert wait_for(process, lambda: finished(results) >= 3)
    interrupt(process)
    process.wait(timeout=60)
    run_id = run_id_in(results)
    assert run_id is not None
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = [f"resume={run_id}", f"results_dir={results}"]
        typed = compose("config", words)
        alone, launched = (resume.compose(typed, words, rank).parallel for rank in (None, Rank(0, 3, 0, 3)))
        fixed = resume.compose(typed, [*words, "parallel.dp=3"], Rank(0, 3, 0, 3)).parallel
    assert (alone, launched) == ({"tp": 1, "dp": 2}, {"tp": None, "dp": None})  # by itself with as many ranks as it had
    assert fixed == {"tp": None, "dp": 3}
    run = harness(f"resume={run_id}", results=results, launcher=deepspeed(1))
    check(run, whole)
    first, second = run.record["segments"]
    assert (first["dp"], second["dp"], run.row["dp"]) == (2, 1, "1")
    assert second["changed"] == {"parallel.dp": [2, 1]}
    assert first["split"]["asked"] == second["split"]["asked"] == {"tp": None, "dp": None}
    assert second["config"]["parallel"] == {"tp": 1, "dp": 1}
    assert second["config_hash"] == config_hash(second["config"])


@pytest.mark.slow
def test_ctrl_c_then_other_settings_then_a_timeout(tmp_path: Path, whole: Run, harness: Harness) -> None:
    results = tmp_path / "results"
    process = begin(results, "engine.token_budget=64")
    assert wait_for(process, lambda: finished(results) >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log = Path(f"{results}.log").read_text()
    run_id = run_id_in(results)
    assert run_id is not None and f"resume={run_id} does the rest" in log
    (row,) = read_rows(results / "runs.csv")
    assert (row["status"], row["completed"]) == ("interrupted", str(finished(results)))
    run = harness(f"resume={run_id}", "parallel.dp=2", "engine.kv_memory=256MiB", results=results)
    check(run, whole)
    first, second = run.record["segments"]
    assert (first["status"], first["elapsed_is_estimated"], second["status"]) == ("interrupted", False, "ok")
    assert (first["dp"], second["dp"], run.row["dp"]) == (1, 2, "2")
    assert second["changed"] == {
        "engine.kv_memory": [first["config"]["engine"]["kv_memory"], "256MiB"],
        "parallel.dp": [1, 2],
    }
    assert "parallel.dp=2 (was 1)" in run.record["notes"][-1]
    assert run.record["config"]["engine"]["token_budget"] == 64
    assert run.row["config_hash"] not in (first["config_hash"], second["config_hash"])
    assert run.record["command_line"] != second["command_line"]
    assert f"resume={run_id}" in second["command_line"]


@pytest.mark.slow
def test_a_run_that_timed_out_is_gone_on_with_under_bare_deepspeed(tmp_path: Path, harness: Harness) -> None:
    results = tmp_path / "results"
    words = [*TINY, *RANDOM, "dataset.num_samples=4000", "dataset.input_len=16", "dataset.output_len=16"]
    process = begin(results, "timeout_s=1000", launcher=deepspeed(1), words=words)
    assert wait_for(process, partial(has_lines, results, 100))
    family(process)["rank 0"].send_signal(signal.SIGALRM)  # the timer's own
    assert process.wait(timeout=60) == 1
    (row,) = read_rows(results / "runs.csv")
    assert row["status"] == "timeout" and "timeout_s=1000" in row["error"]
    first = int(row["completed"])
    assert 100 <= first < 4000
    run = harness(f"resume={row['run_id']}", "timeout_s=null", launcher=deepspeed(1), results=results)
    assert run.status == 0, run.stderr
    assert (run.row["status"], run.row["completed"]) == ("ok", "4000")
    assert sorted(run.completions) == list(range(4000))
    check_against_ids(run)
    one, two = run.record["segments"]
    assert (one["completed"], two["completed"]) == (first, 4000 - first)
    assert not one["elapsed_is_estimated"]


@pytest.mark.slow
def test_a_run_that_failed_before_its_clock_is_gone_on_with(tmp_path: Path, harness: Harness) -> None:
    overrides = [*TINY, *RANDOM, *SIMULATED, "dataset.num_samples=10", "dataset.input_len=16", "dataset.output_len=4"]
    refused = harness(*overrides, "engine.kv_memory=1KiB")
    assert (refused.status, refused.row["status"]) == (2, "invalid")
    run = harness(f"resume={refused.row['run_id']}", "engine.kv_memory=64MiB")
    assert (run.status, run.row["status"], run.row["completed"]) == (0, "ok", "10")
    assert [part["status"] for part in run.record["segments"]] == ["invalid", "ok"]
    assert run.record["segments"][0]["elapsed_s"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a file system of 600 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_is_gone_on_with_once_there_is_room(
    small_disk: Path, tmp_path: Path, whole: Run, harness: Harness
) -> None:
    results = small_disk / "results"
    line = command(*work(), f"results_dir={results}")
    process = begun(line, forked=True)
    while finished(results) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("\n") == 1 and "No space left on device" in stderr, stderr
    run_id = run_id_in(results)
    assert run_id is not None and f"resume={run_id} does the rest" in stderr
    kept = complete_lines(results / run_id / "completions.jsonl")
    assert 3 <= kept.count(b"\n") < REQUESTS
    assert all(whole.token_ids[entry["index"]] == entry["token_ids"] for entry in map(json.loads, kept.splitlines()))
    assert read_record(results, run_id) is not None
    assert list(results.glob("*/*.tmp")) == []
    filler.unlink()
    run = harness(f"resume={run_id}", results=results)
    check(run, whole)
    assert (results / run_id / "completions.jsonl").read_bytes().startswith(kept)


# --- what is refused ---


def resumed(results: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python("harness/main.py", *words, f"results_dir={results}")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns where a run is that Ctrl-C ended, and its id."""
    results = tmp_path_factory.mktemp("interrupted")
    process = start(results, *PACED)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    run_id = run_id_in(results)
    assert run_id is not None
    return results, run_id


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["resume=20260101-000000-fastgen-0000"], "resume: no run 20260101-000000-fastgen-0000 in "),
        (["resume=../x"], "run id: '../x' is not one; "),
        (["resume={id}", "dataset.seed=7"], "dataset.seed: 7 here, 0 in {id}; give resume={id} without it, "),
        (["resume={id}", "model.dtype=bfloat16"], "model.dtype: 'bfloat16' here, 'float32' in {id}; "),
        (["resume={id}", "generation.max_output_len=3"], "generation.max_output_len: 3 here, None in {id}; "),
        (["resume={id}", "engine.name=baseline"], "engine.name: 'baseline' here, 'simulate' in {id}; "),
        (["resume={id}", "repeat=2"], "resume: "),
        (["resume={id}", "repeat_until=2%"], "resume: "),
        (["-m", "resume={id}", "engine.token_budget=64,128"], "resume: "),
        (["resume={id}", "engine.token_bugdet=64"], "engine.token_bugdet: no such key; "),
        (["resume={id}", "engine=simulate", "dataset=sample"], "dataset.input_len: None here, 16 in {id}; "),
    ],
)
def test_what_is_no_going_on_is_refused_and_changes_nothing(
    interrupted: tuple[Path, str], words: list[str], line: str
) -> None:
    results, run_id = interrupted
    files = [results / "runs.csv", *(results / run_id / name for name in ("record.json", "config.yaml"))]
    before = [path.read_bytes() for path in files]
    done = answered(*(word.replace("{id}", run_id) for word in words), f"results_dir={results}")
    assert_refused(done, "error: " + line.replace("{id}", run_id))
    assert [path.read_bytes() for path in files] == before


@pytest.mark.slow
def test_a_run_that_is_still_being_run_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path, *PACED)
    try:
        run_id = run_id_in(tmp_path)
        done = resumed(tmp_path, f"resume={run_id}")
        assert_refused(done, f"error: resume: {run_id} is still being run (process {ranks_of(process)[0].pid}); ")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert (tmp_path / str(run_id) / LOCK).exists()
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "interrupted"


@pytest.mark.slow
def test_a_dataset_that_has_changed_is_other_work(tmp_path: Path) -> None:
    dataset = tmp_path / "requests.json"
    entries: list[list[object]] = [[f"Number {number}", 1, 40] for number in range(9000)]
    dataset.write_text(json.dumps(entries))
    results = tmp_path / "results"
    process = begin(results, words=[*TINY, *PACED, "dataset=asc24", f"dataset.path={dataset}"])
    assert wait_for(process, partial(has_lines, results, 5))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    entries[7][0] = "Another one"
    dataset.write_text(json.dumps(entries))
    run_id = run_id_in(results)
    before = (results / str(run_id) / "record.json").read_bytes()
    assert_refused(resumed(results, f"resume={run_id}"), "error: resume: dataset_sha256 is ")
    assert (results / str(run_id) / "record.json").read_bytes() == before


# --- the segments' arithmetic ---


def test_the_last_sign_of_life_is_the_latest_of_all_files(tmp_path: Path) -> None:
    assert segments.last_sign_of_life(tmp_path) is None
    (tmp_path / "completions.jsonl").write_text('{"finished_s": 3.5}\n{"finished_s": 4.5}\n{"finis')
    assert segments.last_sign_of_life(tmp_path) == 4.5
    (tmp_path / "passes.csv").write_text("step,started_s,seconds\n1,4.0,0.25\n2,5.0,0.75\n3,9")
    assert segments.last_sign_of_life(tmp_path) == 5.75
    (tmp_path / "telemetry.csv").write_text("time_s,x\n,1\n6.25,1\n7.2")
    assert segments.last_sign_of_life(tmp_path) == 6.25


def test_what_one_segment_does_not_know_the_whole_does_not() -> None:
    one = {"steps": 3, "preemptions": 1, "energy_j": None, "peak_memory_bytes": 7, "config_hash": "a"}
    two = {"steps": 4, "preemptions": 0, "energy_j": 5.0, "peak_memory_bytes": 5, "config_hash": "a"}
    record = {"segments": [one | {"time": {"x": 1.0}}, two | {"time": {"x": 2.0}}]}
    found = segments.whole_run(record)
    assert (found["steps"], found["preemptions"], found["energy_j"]) == (7, 1, None)
    assert (found["peak_memory_bytes"], found["config_hash"], found["time"]) == (7, "a", {"x": 3.0})
    record["segments"][1]["config_hash"] = "b"
    assert segments.whole_run(record)["config_hash"] not in ("a", "b")


def test_segments_on_several_machines_are_none_of_them() -> None:
    one: dict[str, Any] = {"device_name": "H100", "kernels": "native", "tp": 1, "dp": 1, "time": {}, "elapsed_s": 2.0}
    one |= {"elapsed_is_estimated": False}
    same = {"segments": [one, one], "device_name": "H100", "model_flops_utilisation": 0.3}
    assert not {"device_name", "model_flops_utilisation"} & segments.whole_run(same).keys()
    assert "H100" not in segments.note(same)
    found = segments.whole_run({"segments": [one, one | {"device_name": "A100"}]})
    assert (found["device_name"], found["model_flops_utilisation"]) == ("H100 + A100", None)
    assert segments.note({"segments": [one, one | {"device_name": "A100"}]}).endswith("; with device_name H100 + A100")
    assert segments.whole_run({"segments": [one, one | {"dp": 8}]})["model_flops_utilisation"] is None
    few, many = ({"hardware_measured": {"machine": {"cores": cores}}} for cores in (2, 64))
    assert segments.whole_run({"segments": [one | few, one | many]})["model_flops_utilisation"] is None
    assert "model_flops_utilisation" not in segments.whole_run({"segments": [one | few, one]})


def test_what_the_config_calls_the_model_is_no_fact(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, "20260101-000000-fastgen-0001", {"model": {"name": "demo"}}, [])
    recorder.finish("failed", "killed in its imports")
    again = RunRecorder.resume(tmp_path, recorder.run_id, {"model": {"name": "demo"}}, [])
    again.check_work(model="the checkpoint's own name")
    again.release()


def test_closing_that_fails_once_is_done_again_from_the_same_record(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, "20260101-000000-fastgen-0001", {}, [])
    recorder.finish("interrupted", "interrupted", clock_s=10.0)
    again = RunRecorder.resume(tmp_path, recorder.run_id, {}, [])
    again.note()
    table = (tmp_path / "runs.csv").read_bytes()
    (tmp_path / "runs.csv").unlink()
    (tmp_path / "runs.csv").mkdir()
    with pytest.raises(UserError):
        again.finish("ok", elapsed_s=15.0)
    (tmp_path / "runs.csv").rmdir()
    (tmp_path / "runs.csv").write_bytes(table)
    again.finish("ok", elapsed_s=15.0)
    again.release()
    record = read_record(tmp_path, recorder.run_id)
    assert record is not None
    assert [part["elapsed_s"] for part in record["segments"]] == [10.0, 5.0]
    assert len([note for note in record["notes"] if note.startswith("resumed")]) == 1


def test_a_run_that_another_launch_goes_on_with_is_not_closed(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, "20260101-000000-fastgen-0001", {}, [])
    recorder.note(launcher=["here", 1])
    assert close_unfinished(tmp_path, recorder.run_id, "failed", "killed", launcher=["here", 2]) is None
    assert close_unfinished(tmp_path, recorder.run_id, "failed", "killed", launcher=["here", 1]) is not None


def test_a_run_all_of_whose_requests_were_rejected_is_not_gone_on_with(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, "20260101-000000-fastgen-0001", {}, [])
    recorder.add(Completion(0, 0, 0, "rejected", [], "", None, None, "too long"))
    recorder.finish("invalid", "all 1 requests were rejected; the last: too long")
    with pytest.raises(UserError, match=r"all requests of .* were rejected: .*too long; start a new run"):
        RunRecorder.resume(tmp_path, recorder.run_id, {}, [])
