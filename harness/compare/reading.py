"""What ``compare`` reads: tables of runs, and the configs in the records beside them.

A setting has one name, wherever it was read: the one that the command line of a run has for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, printable, quoted
from harness.config.identity import UNHASHED_KEYS, flat
from harness.results.columns import FIGURES, TABLE, names_of
from harness.results.directory import read_record, round_of
from harness.results.table import read_table

# Columns that tell how a run was configured, and the key of the config that each of them settles: what a run found out,
# which is in no config, comes last, digests at the very end.
KEYS = {
    column.name: column.setting
    for column in sorted(TABLE, key=lambda one: (one.setting == one.name and one.config is None, one.digest))
    if column.setting is not None
}
DIGESTS = names_of(column for column in TABLE if column.digest)  # shown by their first digits
REJECTED = "rejected"
COUNTS = names_of(
    column for column in TABLE if column.name == REJECTED or (column.setting is not None and column.kind is int)
)
UNKNOWN = object()
OF_RECORD = ("config", "command_line", "round", "power")  # the rest of thousands of records would fill the memory
NAMES_OF_GROUPS = ("engine", "model", "dataset", "hardware")
UNBUDGETED = ("baseline", "ds_inference")  # whose records had the keys of all engines once, these two unused


@dataclass(slots=True)
class ComparedRun:
    """One row of a table: text by column, numbers by column (None where unknown), and where its files lie."""

    cells: dict[str, str]
    numbers: dict[str, float | None]
    results_dir: Path
    _read: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def run_id(self) -> str:
        """The name of the run and of its directory."""
        return self.cells["run_id"]

    @property
    def ok(self) -> bool:
        """Whether every accepted request completed."""
        return self.cells.get("status") == "ok"

    def settings(self) -> dict[str, Any]:
        """Returns what the row says of the config, by the command line's names; what it leaves open is absent."""
        found: dict[str, Any] = {}
        for column, key in KEYS.items():
            if column in COUNTS:
                number = self.numbers.get(column)
                if number is not None:
                    found[key] = _whole(number)
            elif text := self.cells.get(column):
                found[key] = text
        if self.ok and "quantization" in self.cells:
            found.setdefault("engine.quantization", None)  # an empty cell says that there was none
        return found

    def _record(self) -> dict[str, Any]:
        """Returns what is asked of the run's ``record.json``, which is read once; empty without one."""
        if self._read is None:
            try:
                whole = read_record(self.results_dir, self.run_id) or {}
            except UserError:  # no run of ours: its id could not name a directory
                whole = {}
            self._read = {name: whole[name] for name in OF_RECORD if name in whole}
        return self._read

    def round(self) -> tuple[str, int] | None:
        """Returns the series and the round of a run that several were made in turn with; None of any other."""
        return round_of(self._record())

    def power(self) -> dict[str, Any] | None:
        """Returns the verdict on the run's power limit; None where it had none."""
        found = self._record().get("power")
        return found if isinstance(found, dict) and "verdict" in found else None

    def asked(self) -> set[str] | None:
        """Returns the keys that the run's command line, or the sweep that made it, set; None where it does not say."""
        record = self._record()
        line, own = record.get("command_line"), (record.get("round") or {}).get("varied", [])
        if not isinstance(line, list) or not isinstance(own, list):
            return None
        words = [word for word in [*line, *own] if isinstance(word, str) and not word.startswith("-")]
        return {word.partition("=")[0].lstrip("+~") for word in words if "=" in word}

    def record_settings(self) -> dict[str, Any]:
        """Returns the config in the run's ``record.json``, by the command line's names; empty without a record."""
        config = self._record().get("config")
        if not isinstance(config, dict):
            return {}
        whole = flat({key: value for key, value in config.items() if key not in UNHASHED_KEYS})
        found = {
            printable(key): json.dumps(value) if isinstance(value, list) else value
            for key, value in whole.items()
            if value != {}
        }
        for group in NAMES_OF_GROUPS:
            if f"{group}.name" in found:
                found[group] = found.pop(f"{group}.name")
        return {key: value for key, value in found.items() if value != "auto"}


def _whole(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def shown(key: str, value: Any) -> str:
    """Returns a setting as text, as a person would type it; a digest by its first digits."""
    if value is UNKNOWN:
        return "?"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if key in DIGESTS:
        return str(value)[:8]
    return printable(str(value))


def settings_of(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Returns the settings that runs of one config share: what their rows say, completed from one record."""
    rows: dict[str, Any] = {}
    for run in runs:
        rows = {**run.settings(), **rows}
    record = next((found for found in (run.record_settings() for run in runs) if found), {})
    finished = any(run.ok for run in runs)
    for column, key in KEYS.items():
        # A run that was refused may not have come to the columns its config settles; of one that is ok they are right.
        settled = finished and column in runs[0].cells
        unused = column in ("token_budget", "max_sequences") and rows.get("engine") in UNBUDGETED
        if settled or unused or record.get(key) is None:
            record.pop(key, None)
    return {**record, **rows}


def load(paths: Sequence[str], warn: Callable[[str], None]) -> list[ComparedRun]:
    """Returns the runs of several ``runs.csv``, each run once.

    Args:
        paths: files, or directories that hold a ``runs.csv``.
        warn: called with one line for each kind of trouble that leaves something to compare.

    Raises:
        UserError: a file is missing, cannot be read or is no table of runs, or there is no run in any of them.
    """
    runs: dict[str, ComparedRun] = {}
    left_out = False
    for given in paths:
        path = Path(given) / "runs.csv" if Path(given).is_dir() else Path(given)
        if not path.exists():
            raise UserError(str(path), "there is no such file", "run a job first, or name another runs.csv")
        try:
            header, rows, _ = read_table(path)
        except UserError as error:
            raise UserError(error.field, error.found, "name the runs.csv of a results directory") from error
        torn = [
            number
            for number, row in enumerate(rows, start=1)
            if len(row) != len(header) or not row[header.index("run_id")].strip()
        ]
        if torn:
            left_out = True
            more = f" and {len(torn) - 1} more" if len(torn) > 1 else ""
            has = f"{len(rows[torn[0] - 1])} of {len(header)} cells"
            warn(f"{path}: row {torn[0]}{more} left out: it was cut short or edited ({has}, or no run_id)")
        skipped = set(torn)
        for number, row in enumerate(rows, start=1):
            if number not in skipped:
                cells = {name: _readable(cell) for name, cell in zip(header, row, strict=True)}
                runs.setdefault(cells["run_id"], ComparedRun(cells, {}, path.parent))
    if not runs:
        where = ", ".join(str(path) for path in paths)
        if left_out:
            raise UserError(where, "no whole row is left in it", "run a job, or name another runs.csv")
        raise UserError(where, "no runs in it", "run a job first")
    found = list(runs.values())
    _read_numbers(found, warn)
    return found


def _readable(cell: str) -> str:
    """Returns a cell as text that every terminal and browser takes: what is not printable UTF-8 is replaced."""
    text = cell if cell.isascii() else cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def _read_numbers(runs: list[ComparedRun], warn: Callable[[str], None]) -> None:
    for name in (*FIGURES, *COUNTS):
        wrong = []
        for run in runs:
            text = run.cells.get(name, "")
            if not text:
                continue
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                run.numbers[name] = number
            else:
                wrong.append(run)
        if wrong:
            more = f" ({len(wrong) - 1} more such cells)" if len(wrong) > 1 else ""
            first = f"{quoted(wrong[0].cells[name], 30)} of run {wrong[0].run_id}"
            warn(f"{wrong[0].results_dir / 'runs.csv'}: {name} {first} is not a number; taken as unknown{more}")
