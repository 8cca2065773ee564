"""The one table of columns: whatever lists columns, in code or documents, says what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.documents import ROOT, tables

from harness.compare import groups, page, reading, text
from harness.config.identity import flat
from harness.engines.statistics import EngineStatistics, merged_statistics
from harness.results import columns, segments
from harness.results.columns import COLUMNS, FIGURES, TABLE, Column, Combine, Source
from harness.results.completions import Tally
from harness.results.table import put_row, read_table
from harness.verify import recount

# What tables of earlier versions have, in this order; new columns come behind them.
FIXED = """
run_id started_at status error engine kernels model weights dtype quantization dataset dataset_sha256 stop requests
completed rejected prompt_tokens output_tokens total_tokens elapsed_s load_s warmup_s requests_per_s
total_tokens_per_s output_tokens_per_s ttft_p50_s ttft_p99_s latency_p50_s latency_p99_s tp dp device device_name
token_budget max_sequences steps preemptions kv_peak_utilisation peak_memory_bytes model_flops_utilisation energy_j
config_hash git_commit parity_checked parity_exact_share parity_explained_share
""".split()  # noqa: SIM905
BY_NAME = {column.name: column for column in TABLE}


def test_columns_stay_where_they_are() -> None:
    assert list(COLUMNS[: len(FIXED)]) == FIXED
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_the_documented_table_is_this_one() -> None:
    (table,) = [rows for heading, rows in tables(ROOT / "results" / "README.md") if heading == "Columns of runs.csv"]
    assert table[0] == ["column", "unit", "meaning"]
    assert table[1:] == [[f"`{column.name}`", column.unit, column.meaning] for column in TABLE]


def test_a_table_of_runs_has_these_columns(tmp_path: Path) -> None:
    put_row(tmp_path, {"run_id": "a"})
    assert tuple(read_table(tmp_path / "runs.csv")[0]) == COLUMNS


@pytest.mark.parametrize("column", TABLE, ids=COLUMNS)
def test_a_column_is_consistent(column: Column) -> None:
    assert column.meaning and column.kind in (str, int, float)
    assert (column.source is Source.RATE) == (column.rate_of is not None)
    assert (column.source is Source.CONFIG) == (column.config is not None)
    if column.rate_of is not None:
        assert BY_NAME[column.rate_of].source is Source.COUNT
    if column.config is not None:
        assert column.setting in (column.config, column.config.removesuffix(".name"))
    if column.figure is not None:
        assert column.kind is not str and column.setting is None
    if column.source in (Source.COUNT, Source.RATE, Source.TIME):
        assert column.segments is column.ranks is Combine.WHOLE


def test_the_config_settles_the_columns_that_name_a_key_of_it() -> None:
    config: dict[str, Any] = {}
    for column in TABLE:
        if column.config is not None:
            group, key = column.config.split(".")
            config.setdefault(group, {})[key] = f"value of {column.config}"
    assert columns.columns_from_config(config) == {
        column.name: f"value of {column.config}" for column in TABLE if column.config is not None
    }
    assert set(columns.columns_from_config({"engine": {"name": "auto"}}).values()) == {None}


def test_counts_are_what_the_recorder_counts_and_verify_counts_again() -> None:
    counted = columns.names_of(column for column in TABLE if column.source is Source.COUNT)
    timed = columns.names_of(column for column in TABLE if column.source in (Source.RATE, Source.TIME))
    assert set(Tally().figures(1.0)) == {*counted, *timed}
    assert counted == recount.COUNTS
    assert {name: BY_NAME[name].rate_of for name in recount.RATES} == recount.RATES


def test_segments_are_combined_as_the_table_says() -> None:
    def segment(value: int) -> dict[str, Any]:
        return {column.name: value if column.kind is not str else f"{value}" for column in TABLE}

    commits = [{"environment": {"git": {"commit": f"{value}"}}} for value in (3, 5)]
    parts = [segment(value) | commit for value, commit in zip((3, 5), commits, strict=True)]
    whole = segments.whole_run({"segments": parts})
    for column in TABLE:
        if column.segments is Combine.SUM:
            assert whole[column.name] == 8
        elif column.segments is Combine.HIGHEST:
            assert whole[column.name] == 5
        elif column.segments is Combine.MEAN:
            assert whole[column.name] == (3 * 3 + 5 * 5) / 8  # the segments took as many seconds
        elif column.segments is Combine.JOINED:
            assert whole[column.name] == "3 + 5"
        elif column.segments is Combine.HASHED:
            assert whole[column.name] not in ("3", "5")
        elif column.name != "model_flops_utilisation":  # unknown where the devices are others
            assert column.name not in whole


def test_ranks_are_combined_as_the_table_says() -> None:
    names = {field.name for field in dataclasses.fields(EngineStatistics)} & set(COLUMNS)
    assert names >= {column.name for column in TABLE if column.source is Source.ENGINE and column.ranks is Combine.SUM}
    whole = merged_statistics([EngineStatistics(**dict.fromkeys(names, value)) for value in (3, 5)])
    values = {Combine.SUM: 8, Combine.HIGHEST: 5}
    for name in names:
        assert getattr(whole, name) == values[BY_NAME[name].ranks]


def test_segments_keep_the_columns_of_their_own(tmp_path: Path) -> None:
    record: dict[str, Any] = {column.name: f"a {column.name}" for column in TABLE} | {"elapsed_s": 2.0}
    segments.end(record, tmp_path, 0)
    (kept,) = record["segments"]
    own = (Combine.EACH, Combine.SUM, Combine.HIGHEST, Combine.MEAN, Combine.JOINED, Combine.HASHED)
    expected = {column.name for column in TABLE if column.segments in own} - {segments.COMMIT}
    assert expected == (kept.keys() & set(COLUMNS)) - {"started_at", "elapsed_s", "completed"}
    begun = segments.begin(record, tmp_path, 0, {"config": {}}, [])
    first = {column.name for column in TABLE if column.segments is Combine.FIRST}
    assert {name: begun[name] for name in first} == {name: f"a {name}" for name in first}


def test_compare_takes_settings_and_figures_from_the_table() -> None:
    assert {name: BY_NAME[name].setting for name in reading.KEYS} == reading.KEYS
    assert set(reading.KEYS) == {column.name for column in TABLE if column.setting is not None}
    assert set(FIGURES) == {column.name for column in TABLE if column.figure is not None}
    assert [figure.place for figure in FIGURES.values()] == list(range(1, len(FIGURES) + 1))
    rooms = [figure.room for figure in text.OPTIONAL.values()]
    assert rooms == list(range(1, len(rooms) + 1))
    assert {*text.OPTIONAL, *page.FIGURE_COLUMNS} < set(FIGURES)
    assert set(groups.IDENTITY) == {column.name for column in TABLE if column.repeats}
    assert groups.IDENTITY[0] == "config_hash"


def test_nested_settings_have_whole_keys() -> None:
    config = {"a": {"b": 1, "c": {"d": [1]}, "e": {}}, "f": None}
    assert flat(config) == {"a.b": 1, "a.c.d": [1], "a.e": {}, "f": None}
    assert flat(config, depth=2) == {"a.b": 1, "a.c": {"d": [1]}, "a.e": {}, "f": None}
    assert flat({}) == {}
