"""``runs.csv``, the table of all runs: one row a run, readable after a crash at any moment.

A row is one write of one line under a lock, so that at most the last line is torn.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import filelock

from harness.errors import UserError
from harness.files import cannot_write, open_append, plain, replace, write_all

# fmt: off
COLUMNS: tuple[str, ...] = (
    "run_id", "started_at", "status", "error", "engine", "kernels", "model", "weights", "dtype",
    "quantization", "dataset", "dataset_sha256", "stop", "requests", "completed", "rejected",
    "prompt_tokens", "output_tokens", "total_tokens", "elapsed_s", "load_s", "warmup_s",
    "requests_per_s", "total_tokens_per_s", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s",
    "latency_p50_s", "latency_p99_s", "tp", "dp", "device", "device_name", "token_budget",
    "max_sequences", "steps", "preemptions", "kv_peak_utilisation", "peak_memory_bytes",
    "model_flops_utilisation", "energy_j", "config_hash", "git_commit",
    "parity_checked", "parity_exact_share", "parity_explained_share",
)
# fmt: on
LOCK_TIMEOUT_S = 60.0
CELL_LIMIT = 1000
FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width


def cell_text(name: str, value: Any) -> str:
    """Returns one cell: unknown is empty, counts are exact, other numbers have 6 digits and times 9.

    Text stays on one line, and none starts a formula in a spreadsheet.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
        return format(value, ".9g" if name.endswith("_s") and not name.endswith("_per_s") else ".6g")
    if isinstance(value, int):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(plain(value))
    text = "".join(char if char.isprintable() else " " for char in text).strip()[:CELL_LIMIT]
    return "'" + text if text.startswith(FORMULA_STARTS) else text


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
