"""Runs as a Parquet file: a row a run, every column of its own type, so that a program need not guess from text."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pyarrow
from pyarrow import parquet

from harness.compare.comparison import Comparison
from harness.compare.groups import Group
from harness.compare.reading import KEYS, ComparedRun, shown
from harness.results.columns import TABLE

MOMENT = "started_at"
KINDS = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
GROUP, PLACE = "group", "results_dir"  # beside the columns of the table


def as_bytes(comparison: Comparison) -> bytes:
    """Returns the file: the runs of all groups, best first, and of each the settings that set groups apart.

    A column of ``runs.csv`` has its name and type, its unit and meaning as metadata; a setting that is none has the
    command line's name. What is unknown, or not of the column's type, is null.
    """
    runs = [(one, run) for one in comparison.groups for run in one.runs]
    fields, arrays = [], []
    for column in TABLE:
        kind = KINDS[column.kind] if column.name != MOMENT else pyarrow.timestamp("s", "UTC")
        read: Callable[[str], Any] = _moment if column.name == MOMENT else column.kind
        about = {"unit": column.unit, "meaning": column.meaning}
        fields.append(pyarrow.field(column.name, kind, metadata=about))
        arrays.append(pyarrow.array([_cell(run, column.name, read) for _, run in runs], kind))
    said = {GROUP: [one.run_id for one, _ in runs], PLACE: [str(run.results_dir) for _, run in runs]}
    for name, texts in said.items():
        fields.append(pyarrow.field(name, pyarrow.string()))
        arrays.append(pyarrow.array(texts, pyarrow.string()))
    for key in comparison.keys:
        if key not in KEYS.values():
            values = _setting([one for one, _ in runs], key)
            fields.append(pyarrow.field(key, values.type))
            arrays.append(values)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields)), sink)
    return bytes(sink.getvalue())


def _cell(run: ComparedRun, name: str, read: Callable[[str], Any]) -> Any:
    text = run.cells.get(name, "")
    try:
        return read(text) if text else None
    except ValueError:
        return None


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _setting(groups: list[Group], key: str) -> Any:
    """Returns the values of a setting: numbers or true and false where all that are known are, else texts."""
    values = [one.settings.get(key) for one in groups]
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds:
        kind = pyarrow.float64() if float in kinds else pyarrow.int64()
        return pyarrow.array(values, kind)
    if kinds == {bool}:
        return pyarrow.array(values, pyarrow.bool_())
    return pyarrow.array([None if value is None else shown(key, value) for value in values], pyarrow.string())
