"""``compare --parquet``: every run, every column of its own type, unknown as null, and bad places refused."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.made_runs import comparison, run

from harness.compare import __main__ as compare
from harness.compare.parquet import as_bytes
from harness.results.columns import COLUMNS, TABLE
from harness.results.table import read_rows


def table(results: Path) -> pyarrow.Table:
    return parquet.read_table(pyarrow.BufferReader(as_bytes(comparison(results))))


def test_every_run_is_a_row_and_every_column_has_its_type(tmp_path: Path) -> None:
    for number in range(3):
        run(tmp_path, f"run{number}", rate=100.0 + number, energy_j=12.5)
    run(tmp_path, "broken", status="failed", error="=1+1", **{"engine.order": "longest_first"})
    found = table(tmp_path)
    assert found.num_rows == 4 and tuple(found.column_names[: len(COLUMNS)]) == COLUMNS
    by_id = {row["run_id"]: row for row in found.to_pylist()}
    cells = {row["run_id"]: row for row in read_rows(tmp_path / "runs.csv")}
    for name, row in by_id.items():
        for column in TABLE:
            if column.name != "started_at":
                text = cells[name][column.name]
                assert row[column.name] == (column.kind(text) if text else None), column.name
    assert by_id["run1"]["total_tokens"] == 200 and by_id["run1"]["energy_j"] == 12.5
    assert by_id["broken"]["total_tokens_per_s"] is None  # unknown, not 0
    assert isinstance(by_id["run0"]["started_at"], datetime.datetime) and by_id["run0"]["started_at"].tzinfo
    assert (by_id["broken"]["engine.order"], by_id["run0"]["engine.order"]) == ("longest_first", "dataset")
    assert {by_id[f"run{number}"]["group"] for number in range(3)} == {"run1"}  # the median run's id
    assert found.schema.field("elapsed_s").metadata[b"unit"] == b"s"
    assert found.schema.field("tokens_per_joule").type == pyarrow.float64()  # though nobody has one


def test_settings_keep_their_type(tmp_path: Path) -> None:
    run(tmp_path, "one", **{"engine.kv_memory": 0.5, "engine.cuda_graph": True, "engine.odd": 1})
    run(tmp_path, "two", **{"engine.kv_memory": 1, "engine.cuda_graph": False, "engine.odd": "text"})
    schema = table(tmp_path).schema
    assert schema.field("engine.kv_memory").type == pyarrow.float64()
    assert schema.field("engine.cuda_graph").type == pyarrow.bool_()
    assert schema.field("engine.odd").type == pyarrow.string()


def test_a_cell_that_is_no_number_is_unknown(tmp_path: Path) -> None:
    run(tmp_path, "one")
    path = tmp_path / "runs.csv"
    path.write_text(path.read_text().replace(",130,70,200,", ",many,70,200,"))
    (row,) = table(tmp_path).to_pylist()
    assert (row["prompt_tokens"], row["output_tokens"]) == (None, 70)


def test_the_command_writes_all_that_it_does_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        run(tmp_path, f"run{number}", rate=100.0 + number, **{"engine.token_budget": 64 + number})
    file = tmp_path / "runs.parquet"
    assert compare.main([str(tmp_path), "--limit", "1", "--parquet", str(file), "--where", "status=ok"]) == 0
    said = capsys.readouterr()
    assert said.err == f"wrote {file}\n" and "run3" in said.out and "run1" not in said.out
    assert parquet.read_table(file).num_rows == 4


@pytest.mark.parametrize(("place", "why"), [(".", "is a directory"), ("nowhere/x", "cannot be written"), ("", "names")])
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, why: str
) -> None:
    run(tmp_path, "one")
    assert compare.main([str(tmp_path), "--parquet", place and str(tmp_path / place)]) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and said.err.startswith("error: --parquet: ") and why in said.err and said.err.count("\n") == 1
    )
