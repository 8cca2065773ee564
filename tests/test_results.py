"""results.py: what is on disk after a run, and after a crash."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.basics import outcome
from harness.basics.errors import UserError
from harness.config import identity
from harness.config.schema import DType, Weights
from harness.results import directory
from harness.results.closing import close_unfinished
from harness.results.columns import COLUMNS
from harness.results.completions import percentile, read_completions
from harness.results.recorder import RunRecorder
from harness.results.table import read_rows
from harness.workload.records import Completion, PassRecord

ROOT = Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = {
    "engine": {"name": "fastgen", "token_budget": 512, "kernels": "auto", "quantization": None},
    "model": {"name": "smollm2_135m", "path": "models/demo", "weights": "pretrained", "dtype": "auto"},
    "dataset": {"name": "sample", "num_samples": None},
    "generation": {"stop": "eos"},
    "parallel": {"tp": 1, "dp": 2},
    "results_dir": "results",
    "repeat": 1,
    "timeout_s": None,
}
DONE = Completion(0, 5, 3, "eos", [11, 12, 2], "a b", 0.5, 1.5)
REJECTED = Completion(1, 0, 0, "rejected", [], "", None, None, "prompt is longer than the context")


def start(results_dir: Path, run_id: str = "20260101-000000-fastgen-0001", **changes: Any) -> RunRecorder:
    return RunRecorder.create(results_dir, run_id, {**CONFIG, **changes}, ["harness/main.py", "engine=fastgen"])


def record_of(recorder: RunRecorder) -> dict[str, Any]:
    return json.loads((recorder.directory / "record.json").read_text(encoding="utf-8"))


def test_statuses_are_the_contract() -> None:
    assert outcome.STATUSES == ("ok", "failed", "oom", "timeout", "interrupted", "invalid")


# --- a run that ends well ---


def test_round_trip(tmp_path: Path) -> None:
    recorder = start(tmp_path / "results")
    assert record_of(recorder)["status"] == "running"
    assert record_of(recorder)["pid"] == os.getpid()
    recorder.note(dtype=DType.bfloat16, device="cpu", device_name="A CPU", requests=4, load_s=2.25)
    recorder.note(environment={"git": {"commit": "ab" * 20, "dirty": False}})
    completions = [
        DONE,
        REJECTED,
        Completion(3, 7, 1, "length", [9], "", 1.0, 1.0),
        Completion(2, 10, 20, "length", list(range(20)), "x", 3.0, 4.0),
    ]
    for completion in completions:
        recorder.add(completion)
    row = recorder.finish("ok", elapsed_s=4.0, steps=24, kv_peak_utilisation=1 / 3, timing={"forward_s": 3.5})

    assert tuple(row) == COLUMNS
    expected = {
        "status": "ok",
        "error": None,
        "engine": "fastgen",
        "kernels": None,  # "auto" is no kernel
        "model": "smollm2_135m",
        "dtype": "bfloat16",
        "requests": 4,
        "completed": 3,
        "rejected": 1,
        "prompt_tokens": 22,
        "output_tokens": 24,
        "total_tokens": 46,
        "requests_per_s": 0.75,
        "total_tokens_per_s": 11.5,
        "output_tokens_per_s": 6.0,
        "ttft_p50_s": 1.0,
        "ttft_p99_s": pytest.approx(2.96),
        "latency_p50_s": 1.5,
        "latency_p99_s": pytest.approx(3.95),
        "load_s": 2.25,
        "tp": 1,
        "dp": 2,
        "energy_j": None,
        "config_hash": identity.config_hash(CONFIG),
        "git_commit": "ab" * 20,
    }
    assert {name: row[name] for name in expected} == expected

    with open(tmp_path / "results" / "runs.csv", newline="", encoding="utf-8") as file:
        header, cells = list(csv.reader(file))
    assert tuple(header) == COLUMNS
    text = dict(zip(header, cells, strict=True))
    assert text["total_tokens"] == "46"
    assert text["total_tokens_per_s"] == "11.5"
    assert text["kv_peak_utilisation"] == "0.333333"
    assert text["energy_j"] == text["error"] == text["kernels"] == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text["started_at"])

    record = record_of(recorder)
    assert {name: record[name] for name in COLUMNS} == row
    assert record["timing"] == {"forward_s": 3.5}
    assert record["config"] == CONFIG
    assert record["command_line"] == ["harness/main.py", "engine=fastgen"]
    assert OmegaConf.to_container(OmegaConf.load(recorder.directory / "config.yaml")) == CONFIG

    lines = (recorder.directory / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(json.loads(lines[0])) == [
        "index",
        "prompt_tokens",
        "output_tokens",
        "finish_reason",
        "token_ids",
        "text",
        "first_token_s",
        "finished_s",
    ]
    assert json.loads(lines[1])["error"] == "prompt is longer than the context"
    read = read_completions(recorder.directory / "completions.jsonl")
    assert [Completion(**entry) for entry in read] == completions


def test_a_completion_is_on_disk_before_add_returns(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    path = recorder.directory / "completions.jsonl"
    for count in (1, 2, 3):
        recorder.add(DONE)
        assert path.read_bytes().count(b"\n") == count


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(categories=None), max_size=40))
def test_any_text_is_one_line_for_every_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    recorder = start(tmp_path_factory.mktemp("run"))
    hostile = "\ud800 \u2028 \u2029 \x85 \x0b\x0c\x1c\x1d\x1e \r\n \x00\x1b[31m \x7f \U0001f600 한국어 \udfff"
    for value in (hostile, text):
        recorder.add(replace(DONE, text=value))
    raw = (recorder.directory / "completions.jsonl").read_bytes()
    lines = raw.decode("utf-8").splitlines()
    assert len(lines) == raw.count(b"\n") == 2
    # A high surrogate followed by a low one is one character to JSON; so it is here, after encoding.
    for line, value in zip(lines, (hostile, text), strict=True):
        assert json.loads(line)["text"].encode("utf-16", "surrogatepass") == value.encode("utf-16", "surrogatepass")


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    ids = [numpy.int64(5), numpy.int64(6)]
    recorder.add(replace(DONE, token_ids=ids, output_tokens=numpy.int32(2)))  # type: ignore[arg-type]
    row = recorder.finish("ok", elapsed_s=numpy.float32(2.0), shape=numpy.array([1, 2]), loss=float("nan"))
    assert read_completions(recorder.directory / "completions.jsonl")[0]["token_ids"] == [5, 6]
    assert row["output_tokens_per_s"] == 1.0
    assert read_rows(tmp_path / "runs.csv")[0]["output_tokens"] == "2"
    assert (record_of(recorder)["shape"], record_of(recorder)["loss"]) == ([1, 2], None)


def test_passes_are_written_by_finish(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    for step in range(3):
        recorder.add_pass(PassRecord(step, step + 0.123456789, 0.25, 256, 250, 6, 9, 0.5, 40 - step, 7, None, 8000, 3))
    recorder.finish("ok", elapsed_s=1.0)
    lines = (recorder.directory / "passes.csv").read_text().splitlines()
    assert lines == [
        "step,started_s,seconds,tokens,prompt_tokens,decode_tokens,sequences,kv_utilisation,waiting,"
        "logit_rows,kv_read_tokens,attention_pairs,draft_tokens",
        "0,0.123456789,0.25,256,250,6,9,0.5,40,7,,8000,3",
        "1,1.12345679,0.25,256,250,6,9,0.5,39,7,,8000,3",
        "2,2.12345679,0.25,256,250,6,9,0.5,38,7,,8000,3",
    ]


def test_passes_reach_the_disk_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.results.appending.PASSES_FLUSH_S", 0.0)
    recorder = start(tmp_path)
    for step in range(2):
        recorder.add_pass(PassRecord(step, 0.0, 0.1, 1, 0, 1, 1, 0.0, 0))
        assert (recorder.directory / "passes.csv").read_text().count("\n") == step + 2


def test_finish_twice_is_one_row(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    recorder.add(DONE)
    first = recorder.finish("ok", elapsed_s=1.0)
    assert recorder.finish("failed", "late trouble") is first
    assert close_unfinished(tmp_path, recorder.run_id, "failed", "later trouble") is None
    assert [row["status"] for row in read_rows(tmp_path / "runs.csv")] == ["ok"]
    assert record_of(recorder)["status"] == "ok"


def test_finish_refuses_an_unknown_status(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    with pytest.raises(ValueError, match="'done'"):
        recorder.finish("done")
    assert recorder.finish("ok", elapsed_s=1.0)["status"] == "ok"


def test_a_failed_run_has_counts_but_no_rates(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    recorder.add(DONE)
    recorder.finish("oom", "engine.kv_memory: 3 blocks short\nsecond line")
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["error"] == "engine.kv_memory: 3 blocks short second line"
    assert (row["completed"], row["total_tokens"]) == ("1", "8")
    unknown = (
        "elapsed_s",
        "requests_per_s",
        "total_tokens_per_s",
        "ttft_p50_s",
        "latency_p99_s",
        "load_s",
        "steps",
    )
    assert [row[name] for name in unknown] == [""] * len(unknown)
    assert row["engine"] == "fastgen"
    assert row["dtype"] == ""


# --- names and figures ---


def test_run_ids_are_safe_names() -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-ds_inference-[0-9a-f]{4}", directory.new_run_id("ds_inference"))
    for engine in ("../../etc", "a b\n", "", "x" * 500, "c:\\con", "한국"):
        run_id = directory.new_run_id(engine)
        assert re.fullmatch(r"\d{8}-\d{6}-[A-Za-z0-9_]{1,40}-[0-9a-f]{4}", run_id)
        assert directory.run_directory("r", run_id) == Path("r", run_id)


@pytest.mark.parametrize("run_id", ["../x", "..", "", "a/b", "a\x00b", "-x", "a\n"])
def test_a_run_id_cannot_leave_the_results(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(UserError, match="run id"):
        start(tmp_path / "results", run_id)
    with pytest.raises(UserError, match="run id"):
        close_unfinished(tmp_path / "results", run_id, "failed", None)


def test_config_hash_is_of_the_job() -> None:
    reference = identity.config_hash(CONFIG)
    assert re.fullmatch(r"[0-9a-f]{12}", reference)
    elsewhere = {"results_dir": "other", "resume": "x", "repeat": 3, "timeout_s": 5, "verify": 8, "sweep": {}}
    assert identity.config_hash({**CONFIG, **elsewhere}) == reference
    assert identity.config_hash(dict(reversed(CONFIG.items()))) == reference
    assert identity.config_hash({**CONFIG, "engine": {**CONFIG["engine"], "token_budget": 256}}) != reference
    as_enum = {**CONFIG, "model": {**CONFIG["model"], "weights": Weights.pretrained, "dtype": DType.auto}}
    assert identity.config_hash(as_enum) == reference


def test_config_yaml_keeps_texts_that_look_like_something_else(tmp_path: Path) -> None:
    texts = ["1e5", "null", "on", "${oc.env:HOME}", "a${", "0.30", "-", "\udcff", "C:\\x", "2026-01-01", ""]
    recorder = start(tmp_path, texts=texts)
    read = OmegaConf.load(recorder.directory / "config.yaml")
    assert OmegaConf.to_container(read, resolve=True) == {**CONFIG, "texts": texts}


def test_percentile_of_known_values() -> None:
    assert percentile([], 50) is None
    assert percentile([7.0], 99) == 7.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([4.0, 1.0, 3.0, 2.0], 0) == 1.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 100) == 4.0
    assert percentile(list(range(1, 101)), 99) == pytest.approx(99.01)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    st.sampled_from([0.0, 1.0, 25.0, 50.0, 90.0, 99.0, 100.0]),
)
def test_percentile_equals_numpy(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(numpy.percentile(values, q), rel=1e-9, abs=1e-9)


# --- directories and disks that refuse ---


def test_results_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    hopeless = [
        str(tmp_path / "file"),
        str(tmp_path / "file" / "below"),
        "/proc/nowhere",
        "a\x00b",
        "x" * 300,
        "",
    ]
    for results_dir in hopeless:
        with pytest.raises(UserError) as caught:
            RunRecorder.create(results_dir, "r1", CONFIG, [])
        assert caught.value.field == "results_dir"
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("content", [b"hello\n", b"run_id;status\nx;ok\n", b"\x00\x01\x02\n", b"\xff" * 9])
def test_a_file_that_is_no_table_is_refused_before_the_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"runs\.csv: is not a table of runs; move it aside"):
        start(tmp_path)
    assert (tmp_path / "runs.csv").read_bytes() == content


def test_a_device_as_table_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "runs.csv")
    with pytest.raises(UserError, match="is not a file"):
        start(tmp_path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    (recorder.directory / "completions.jsonl").symlink_to("/dev/full")
    (recorder.directory / "passes.csv").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        recorder.add(DONE)
    assert str(caught.value) == (
        f"{recorder.directory}/completions.jsonl: cannot be written: No space left on device; "
        "free space, then run again"
    )
    recorder.add_pass(PassRecord(0, 0.0, 0.1, 1, 0, 1, 1, 0.0, 0))
    row = recorder.finish("failed", str(caught.value))
    assert (row["completed"], row["status"]) == (0, "failed")
    assert "No space left" in record_of(recorder)["passes_error"]


def test_a_write_that_stops_half_way_leaves_whole_lines(tmp_path: Path) -> None:
    # A limit on the size of files stops a write in the middle of a line, as a disk that fills up does.
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from harness.basics.errors import UserError
from harness.results.recorder import RunRecorder
from harness.workload.records import Completion
recorder = RunRecorder.create({str(tmp_path)!r}, "r1", {{}}, [])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
try:
    for index in range(1000):
        recorder.add(Completion(index, 5, 3, "eos", [1, 2, 3], "text", 0.5, 1.5))
except UserError as error:
    print(index, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
recorder.add(Completion(index, 5, 3, "eos", [1, 2, 3], "text", 0.5, 1.5))
print(recorder.finish("failed", "full")["completed"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refused, completed = done.stdout.splitlines()
    assert "cannot be written: File too large" in refused
    index = int(refused.split()[0])
    assert 10 < index < 100
    assert int(completed) == index + 1
    read = read_completions(tmp_path / "r1" / "completions.jsonl")
    assert [entry["index"] for entry in read] == list(range(index + 1))


# --- crashes, and the parent that cleans up ---


def test_a_killed_rank_is_closed_by_its_parent(tmp_path: Path) -> None:
    parent = start(tmp_path)
    parent.note(launched="by the parent")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from harness.results.recorder import RunRecorder
from harness.workload.records import Completion
recorder = RunRecorder.create({str(tmp_path)!r}, {parent.run_id!r}, {CONFIG!r}, ["as a rank"])
recorder.note(device="cpu", load_s=1.5)
for index in range(7):
    recorder.add(Completion(index, 5, 3, "eos", [1, 2, 3], "text", 0.5, 1.5))
recorder.add(Completion(7, 0, 0, "rejected", [], "", None, None, "too long"))
print("ready", flush=True)
sys.stdin.read()
"""
    # Should an assertion below fail, the rank ends by itself: its standard input is closed with this process.
    rank = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdin is not None and rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    rank.stdin.close()
    rank.stdout.close()
    assert record_of(parent)["pid"] == rank.pid
    with open(parent.directory / "completions.jsonl", "ab") as file:
        file.write(b'{"index": 8, "prompt_tokens": 5, "output_to')

    row = close_unfinished(tmp_path, parent.run_id, "failed", "rank 0 was killed (signal 9)")
    assert row is not None
    counts = ("completed", "rejected", "prompt_tokens", "output_tokens", "total_tokens")
    assert [row[name] for name in counts] == [7, 1, 35, 21, 56]
    assert (row["device"], row["load_s"], row["elapsed_s"], row["total_tokens_per_s"]) == (
        "cpu",
        1.5,
        None,
        None,
    )
    record = record_of(parent)
    assert (record["status"], record["error"]) == ("failed", "rank 0 was killed (signal 9)")
    assert record["launched"] == "by the parent"
    assert record["command_line"] == ["harness/main.py", "engine=fastgen"]
    assert len(read_completions(parent.directory / "completions.jsonl")) == 8
    assert close_unfinished(tmp_path, parent.run_id, "failed", "again") is None
    assert [row["error"] for row in read_rows(tmp_path / "runs.csv")] == ["rank 0 was killed (signal 9)"]


def test_killed_between_row_and_record_both_say_the_same_in_the_end(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    path = recorder.directory / "record.json"
    running = path.read_bytes()
    recorder.finish("ok", elapsed_s=1.0)
    path.write_bytes(running)  # what a process killed before its last write leaves
    close_unfinished(tmp_path, recorder.run_id, "failed", "rank 0 was killed (signal 9)")
    (row,) = read_rows(tmp_path / "runs.csv")
    assert (row["status"], row["elapsed_s"]) == ("failed", "")
    assert (record_of(recorder)["status"], record_of(recorder)["elapsed_s"]) == ("failed", None)


def test_finish_after_the_parent_closed_the_run(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    close_unfinished(tmp_path, recorder.run_id, "timeout", "after 5 s")
    assert recorder.finish("ok", elapsed_s=1.0)["status"] == "timeout"
    assert [row["status"] for row in read_rows(tmp_path / "runs.csv")] == ["timeout"]


@pytest.mark.parametrize("content", [None, b"", b'{"run_id": "r', b"[1]", b"\xff\xfe"])
def test_close_unfinished_without_a_record(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "r1").mkdir()
        (tmp_path / "r1" / "record.json").write_bytes(content)
        with pytest.raises(UserError, match=r"record\.json of r1 is damaged"):
            start(tmp_path, "r1")
    assert close_unfinished(tmp_path, "r1", "failed", "x") is None
    assert not (tmp_path / "runs.csv").exists()


def test_a_rank_takes_over_what_its_parent_began(tmp_path: Path) -> None:
    parent = start(tmp_path)
    parent.note(started_at="2026-01-01T00:00:00Z", attempt=1)
    (parent.directory / "run.log").write_text("the parent's log")
    rank = start(tmp_path)
    record = record_of(rank)
    assert (record["started_at"], record["attempt"]) == ("2026-01-01T00:00:00Z", 1)
    assert (rank.directory / "run.log").read_text() == "the parent's log"


@pytest.mark.parametrize(
    ("tail", "kept"),
    [(b'{"index": 1, "prom', 1), (b"", 1), (b'{"index": 1, "text": "\xed\x95', 1), (None, 2)],
)
def test_a_torn_line_is_not_joined_to_the_next(tmp_path: Path, tail: bytes | None, kept: int) -> None:
    first = start(tmp_path)
    first.add(DONE)
    path = first.directory / "completions.jsonl"
    line = path.read_bytes()
    path.write_bytes(line + (line.rstrip(b"\n") if tail is None else tail))
    assert len(read_completions(path)) == kept
    second = start(tmp_path)
    second.add(replace(DONE, index=9))
    assert path.read_bytes().endswith(b"\n")
    assert [entry["index"] for entry in read_completions(path)] == [0] * kept + [9]
    assert second.finish("ok", elapsed_s=1.0)["completed"] == kept + 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    recorder = start(tmp_path)
    recorder.add(DONE)
    path = recorder.directory / "completions.jsonl"
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"completions\.jsonl, line 1: is not a completion"):
        read_completions(path)
    with pytest.raises(UserError, match="no such file"):
        read_completions(tmp_path / "nothing.jsonl")


def test_a_closed_run_is_not_taken_over(tmp_path: Path) -> None:
    start(tmp_path).finish("ok", elapsed_s=1.0)
    with pytest.raises(UserError, match=r"is closed \(ok\)"):
        start(tmp_path)


def test_nothing_heavy_is_imported() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import harness.results.recorder, harness.machine.snapshot; "
        "print(sorted({'torch', 'transformers', 'deepspeed', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
