"""runs_table.py: the table of runs after many runs at once, after a crash, and from an older version."""

from __future__ import annotations

import csv
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest

from harness.basics.errors import UserError
from harness.results import table
from harness.results.columns import COLUMNS
from harness.results.table import put_row, read_rows


def row_of(run_id: str, **cells: Any) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"run_id": run_id} | cells


def test_columns_are_the_contract() -> None:
    assert ",".join(COLUMNS) == (
        "run_id,started_at,status,error,engine,kernels,model,weights,dtype,quantization,dataset,dataset_sha256,"
        "stop,requests,completed,rejected,prompt_tokens,output_tokens,total_tokens,elapsed_s,load_s,warmup_s,"
        "requests_per_s,total_tokens_per_s,output_tokens_per_s,ttft_p50_s,ttft_p99_s,latency_p50_s,"
        "latency_p99_s,tp,dp,device,device_name,token_budget,max_sequences,steps,preemptions,"
        "kv_peak_utilisation,peak_memory_bytes,model_flops_utilisation,energy_j,config_hash,git_commit,"
        "parity_checked,parity_exact_share,parity_explained_share,simulated,device_busy_share,"
        "tokens_per_joule,cost_per_million_tokens,others_cpu_share,"
        "draft_tokens,accepted_draft_tokens"
    )


@pytest.mark.parametrize(
    ("name", "value", "cell"),
    [
        ("error", "=1+1", "'=1+1"),
        ("error", "\t=1+1", "'=1+1"),
        ("error", "\r\n@SUM(A1)", "'@SUM(A1)"),
        ("model", "+x", "'+x"),
        ("model", "-x", "'-x"),
        ("model", "\uff1dx", "'\uff1dx"),
        ("error", "a\x00b\x1bc\nd\u2028e\ud800", "a b c d e"),
        ("error", "x" * 5000, "x" * 1000),
        ("error", None, ""),
        ("energy_j", float("nan"), ""),
        ("energy_j", float("inf"), ""),
        ("energy_j", 0.0, "0"),
        ("energy_j", -1.5, "-1.5"),
        ("prompt_tokens", 12345678901, "12345678901"),
        ("peak_memory_bytes", 12345678901.0, "12345678901"),
        ("total_tokens_per_s", 1234.56789, "1234.57"),
        ("elapsed_s", 12345.678912, "12345.6789"),
        ("kernels", True, "true"),
    ],
)
def test_cells(tmp_path: Path, name: str, value: Any, cell: str) -> None:
    put_row(tmp_path, row_of("r1", **{name: value}))
    put_row(tmp_path, row_of("r2"))
    rows = read_rows(tmp_path / "runs.csv")
    assert [row["run_id"] for row in rows] == ["r1", "r2"]
    assert rows[0][name] == cell
    assert len((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()) == 3


# --- the table of runs ---


def _put_rows(results_dir: str, writer: int, barrier: Any) -> None:
    barrier.wait()
    for number in range(25):
        put_row(results_dir, row_of(f"w{writer}-{number}", error=f"writer {writer}, " + '"x", ' * 60))


def test_concurrent_runs_lose_and_tear_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_put_rows, args=(str(tmp_path), n, barrier)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert tuple(header) == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert sorted(row[0] for row in rows) == sorted(f"w{w}-{n}" for w in range(4) for n in range(25))
    assert all(row[3].startswith(f"writer {row[0][1]}") and row[3].count('"x"') == 60 for row in rows)


def test_a_run_has_one_row(tmp_path: Path) -> None:
    put_row(tmp_path, row_of("r1", status="ok"))
    put_row(tmp_path, row_of("r2", status="ok"))
    put_row(tmp_path, row_of("r1", status="failed"))
    assert [(row["run_id"], row["status"]) for row in read_rows(tmp_path / "runs.csv")] == [
        ("r2", "ok"),
        ("r1", "failed"),
    ]


def test_an_older_header_is_upgraded(tmp_path: Path) -> None:
    older = 'run_id,status,my notes,error,total_tokens\r\nold1,ok,"keep, this",,17\r\nold2,failed\r\n'
    (tmp_path / "runs.csv").write_bytes(b"\xef\xbb\xbf" + older.encode() + b"old3,ok,caf\xe9\r\n")
    put_row(tmp_path, row_of("new", status="ok", energy_j=5))
    put_row(tmp_path, row_of("newer", status="ok"))
    with open(tmp_path / "runs.csv", newline="", encoding="latin-1") as file:
        header, *rows = list(csv.reader(file))
    assert tuple(header) == (*COLUMNS, "my notes")
    assert {len(row) for row in rows} == {len(COLUMNS) + 1}
    by_id = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(by_id) == ["old1", "old2", "old3", "new", "newer"]
    assert by_id["old1"]["my notes"] == "keep, this"
    assert by_id["old1"]["total_tokens"] == "17"
    assert (by_id["old2"]["status"], by_id["old2"]["energy_j"]) == ("failed", "")
    assert by_id["old3"]["my notes"] == "caf\xe9"
    assert (by_id["new"]["energy_j"], by_id["new"]["my notes"]) == ("5", "")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("older", [False, True])
def test_a_table_torn_anywhere_takes_the_next_row_whole(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "runs.csv"
    put_row(tmp_path, row_of("r1", error='a, "quoted" text', git_commit="abc"))
    put_row(tmp_path, row_of("r2", error='say ""twice"", "now"', git_commit="def"))
    whole = path.read_bytes()
    if older:
        whole = whole.replace(b"run_id,started_at,status", b"run_id,status,started_at", 1)
    body = whole.index(b"\n") + 1
    first_end = whole.index(b"\n", body) + 1
    for cut in [0, 5, body - 1, *range(body, len(whole) + 1)]:
        if older and cut < body:
            continue
        path.write_bytes(whole[:cut])
        put_row(tmp_path, row_of("r3", error="fine", git_commit="xyz"))
        rows = read_rows(path)
        last = rows[-1]
        assert tuple(rows[0]) == COLUMNS, cut
        assert (last["run_id"], last["error"], last["git_commit"]) == ("r3", "fine", "xyz"), cut
        if cut >= first_end:
            assert (rows[0]["run_id"], rows[0]["git_commit"]) == ("r1", "abc"), cut
        assert len(rows) == 1 + (cut > body) + (cut > first_end), cut


@pytest.mark.parametrize("content", [b"hello\n", b"run_id;status\nx;ok\n", b"\x00\x01\x02\n", b"\xff" * 9])
def test_a_file_that_is_no_table_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(UserError, match="not a table"):
        put_row(tmp_path, row_of("r1"))
    assert (tmp_path / "runs.csv").read_bytes() == content


def test_a_linked_table_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared.csv").write_text("run_id,status\nold,ok\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs.csv").symlink_to(tmp_path / "shared.csv")
    put_row(tmp_path / "results", row_of("new"))
    assert [row["run_id"] for row in read_rows(tmp_path / "shared.csv")] == ["old", "new"]
    assert (tmp_path / "results" / "runs.csv").is_symlink()


def test_a_lock_that_is_never_given_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LOCK_TIMEOUT_S", 0.1)
    with filelock.FileLock(tmp_path / "runs.csv.lock"):
        failures: list[BaseException] = []

        def attempt() -> None:
            try:
                put_row(tmp_path, row_of("r1"))
            except UserError as error:
                failures.append(error)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert "is locked" in str(failures[0])
    assert not (tmp_path / "runs.csv").exists()


def test_reading_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_rows(tmp_path / "runs.csv")
