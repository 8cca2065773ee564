"""``runs.csv``, the table of all runs: one row a run, readable after a crash at any moment.

A row is one write of one line under a lock, so that at most the last line is torn.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import filelock

from harness.basics.cells import cell_text
from harness.basics.errors import UserError
from harness.basics.files import cannot_write, open_append, replace, write_all
from harness.results.columns import COLUMNS

LOCK_TIMEOUT_S = 60.0


def _csv_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_table(path: Path) -> tuple[list[str], list[list[str]], str]:
    """Returns header and rows of a ``runs.csv``, and what must be written to end a last line torn by a crash.

    Raises:
        UserError: the file cannot be read, or is no table of runs.
    """
    remedy = "move it aside or set another results_dir"
    if not path.is_file():
        if path.exists():
            raise UserError(str(path), "is not a file", remedy)
        return [], [], ""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", remedy) from error
    if "\n" not in text and ",".join(COLUMNS).startswith(text):
        return [], [], ""  # empty, or torn before the first row
    # A row torn inside quotes would swallow the rows after it.
    mend = "" if text.endswith("\n") else ('"' if text.count('"') % 2 else "") + "\n"
    try:
        rows = [row for row in csv.reader(io.StringIO(text + mend, newline="")) if row]
    except csv.Error:
        rows = []
    if not rows or "run_id" not in rows[0]:
        raise UserError(str(path), "is not a table of runs", remedy)
    return rows[0], rows[1:], mend


def put_row(results_dir: str | Path, row: dict[str, Any]) -> None:
    """Appends one row to ``<results_dir>/runs.csv`` under a lock, so that concurrent runs lose nothing.

    A table with an older header is rewritten with the columns it lacks; foreign columns stay at the end. A
    run has one row: an earlier one with its ``run_id`` is taken out.

    Raises:
        UserError: the table cannot be locked, read or written.
    """
    root = Path(results_dir)
    path = Path(os.path.realpath(root / "runs.csv"))
    try:
        with filelock.FileLock(root / "runs.csv.lock", timeout=LOCK_TIMEOUT_S):
            header, rows, mend = read_table(path)
            old = [dict(zip(header, cells, strict=False)) for cells in rows]
            there = [cells for cells in old if cells.get("run_id") == row["run_id"]]
            if tuple(header[: len(COLUMNS)]) == COLUMNS and not there:
                line = _csv_text([[cell_text(name, row.get(name)) for name in header]])
                table = open_append(path)
                try:
                    write_all(table, (mend + line).encode("utf-8", errors="surrogateescape"))
                    os.fsync(table)
                finally:
                    os.close(table)
                return
            columns = [*COLUMNS, *(name for name in header if name not in COLUMNS)]
            kept = [[cells.get(name, "") for name in columns] for cells in old if cells not in there]
            text = _csv_text([columns, *kept, [cell_text(name, row.get(name)) for name in columns]])
            replace(path, text.encode("utf-8", errors="surrogateescape"))
    except filelock.Timeout as error:
        raise UserError(str(path), f"is locked for {LOCK_TIMEOUT_S:.0f} s", "end the process that holds it") from error
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise cannot_write(path, error) from error


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Returns the rows of a ``runs.csv`` as text by column name; cells a torn or older row lacks are empty.

    Raises:
        UserError: there is no such file, or it is no table of runs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "run a job first, or name another runs.csv")
    header, rows, _ = read_table(path)
    return [dict.fromkeys(header, "") | dict(zip(header, cells, strict=False)) for cells in rows]
