"""The files of a run (``record.json``, ``completions.jsonl``, ...) and ``runs.csv``, the table of all runs.

Every file can be read after a crash at any moment: records are replaced atomically, and a completion or a row
is one write of one line, so that at most the last line is torn.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import socket
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from harness.errors import UserError, quoted

if TYPE_CHECKING:
    from harness.workload import Completion

# fmt: off
COLUMNS: tuple[str, ...] = (
    "run_id", "started_at", "status", "error", "engine", "kernels", "model", "weights", "dtype",
    "quantization", "dataset", "dataset_sha256", "stop", "requests", "completed", "rejected",
    "prompt_tokens", "output_tokens", "total_tokens", "elapsed_s", "load_s", "warmup_s",
    "requests_per_s", "total_tokens_per_s", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s",
    "latency_p50_s", "latency_p99_s", "tp", "dp", "device", "device_name", "token_budget",
    "max_sequences", "steps", "preemptions", "kv_peak_utilisation", "peak_memory_bytes",
    "model_flops_utilisation", "energy_j", "config_hash", "git_commit",
)
# fmt: on
STATUSES = ("ok", "failed", "oom", "timeout", "interrupted", "invalid")
RUNNING = "running"
# Keys that change where and how often a job runs, not what it computes.
UNHASHED_KEYS = ("results_dir", "resume", "sweep", "repeat", "timeout_s", "verify")
LOCK_TIMEOUT_S = 60.0
PASSES_FLUSH_S = 1.0
CELL_LIMIT = 1000
FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width


@dataclass(slots=True)
class PassRecord:
    """One forward pass: times in seconds from the start of the clock, counts of tokens and sequences."""

    step: int
    started_s: float
    seconds: float
    tokens: int
    prompt_tokens: int
    decode_tokens: int
    sequences: int
    kv_utilisation: float | None  # 0..1; None for an engine without a paged cache
    waiting: int | None


PASS_COLUMNS = tuple(field.name for field in fields(PassRecord))


def new_run_id(engine: str) -> str:
    """Returns ``YYYYMMDD-HHMMSS-<engine>-<4 hex>`` (UTC), safe as the name of a directory."""
    now = datetime.datetime.now(datetime.UTC)
    name = re.sub(r"[^A-Za-z0-9]+", "_", engine).strip("_")[:40] or "run"
    return f"{now:%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


def run_directory(results_dir: str | Path, run_id: str) -> Path:
    """Returns ``<results_dir>/<run_id>``.

    Raises:
        UserError: ``run_id`` could name something outside ``results_dir``.
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", run_id) is None:
        raise UserError("run id", f"{quoted(run_id)} is not one", "take it from the first column of runs.csv")
    return Path(results_dir) / run_id


def config_hash(config: dict[str, Any]) -> str:
    """Returns 12 hex digits that are equal for equal jobs, wherever and however often they run."""
    job = {key: value for key, value in config.items() if key not in UNHASHED_KEYS}
    canonical = json.dumps(plain(job), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON knows it: enums by value, paths as text, nan and infinity as None."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "items"):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | array):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, torch
        return plain(value.tolist())
    return str(value)


def percentile(values: Sequence[float], q: float) -> float | None:
    """Returns the ``q``-th percentile (0..100) of ``values``, linearly interpolated; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Returns ``value`` as UTF-8 JSON which holds no line separator but those of ``indent``."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=plain)
    text = re.sub("[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    # A lone surrogate has no UTF-8 form; Python's backslash escape of it is also JSON's.
    return text.encode("utf-8", errors="backslashreplace")


def _yaml_bytes(config: dict[str, Any]) -> bytes:
    """Returns a resolved config as YAML that ``OmegaConf.load`` reads back to the same values."""
    from omegaconf import OmegaConf

    literal = json.loads(json.dumps(config).replace("${", "\\\\${"))  # whatever is left of "${" is plain text
    return OmegaConf.to_yaml(OmegaConf.create(literal)).encode("utf-8", errors="backslashreplace")


def _cannot_write(path: str | Path, error: Exception) -> UserError:
    remedy = "check this path, or set results_dir to another directory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space, then run again"
    return UserError(str(path), f"cannot be written: {getattr(error, 'strerror', None) or error}", remedy)


def _write_all(descriptor: int, data: bytes) -> None:
    """Writes all of ``data``; what a failed write left behind is taken back: no torn line stays."""
    view = memoryview(data)
    size = os.fstat(descriptor).st_size
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        if len(view) < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
        raise


def _replace(path: Path, data: bytes) -> None:
    """Puts ``data`` in place of ``path``: a reader sees the old file or the new one, whole.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def read_record(results_dir: str | Path, run_id: str) -> dict[str, Any] | None:
    """Returns the content of a run's ``record.json``; None when there is none, or it is not one."""
    path = run_directory(results_dir, run_id) / "record.json"
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "status" in record else None


# --- completions.jsonl ---


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a regular file; nothing when there is no such file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from enumerate(file, start=1)


def _completion(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("finish_reason"), str):
        return None
    counts = (value.get("prompt_tokens"), value.get("output_tokens"))
    return value if all(isinstance(count, int) for count in counts) else None


def read_completions(path: str | Path) -> list[dict[str, Any]]:
    """Returns the completions of a ``completions.jsonl``, in order of finishing, without a torn last line.

    Raises:
        UserError: the file cannot be read, or a line that is not the last is no completion.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "a run writes it when its first request finishes")
    found = []
    try:
        for number, line in _lines(path):
            completion = _completion(line)
            if completion is not None:
                found.append(completion)
            elif line.endswith(b"\n"):
                raise UserError(f"{path}, line {number}", "is not a completion", "the file was edited or damaged")
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "check this path") from error
    return found


class _Tally:
    """Counts over completions, and their times in seconds from the start of the clock; no text, no ids."""

    def __init__(self) -> None:
        self.completed = self.rejected = self.prompt_tokens = self.output_tokens = 0
        self.first_token_s, self.finished_s = array("d"), array("d")

    def add(self, completion: dict[str, Any]) -> None:
        """Counts one completion; a rejected request was never fed to the model and adds no tokens."""
        if completion["finish_reason"] == "rejected":
            self.rejected += 1
            return
        self.completed += 1
        self.prompt_tokens += completion["prompt_tokens"]
        self.output_tokens += completion["output_tokens"]
        for name, values in (("first_token_s", self.first_token_s), ("finished_s", self.finished_s)):
            if completion.get(name) is not None:
                values.append(completion[name])

    @classmethod
    def of_file(cls, path: Path) -> _Tally:
        """Counts what is on disk; lines that are no completions are passed over."""
        tally = cls()
        for _, line in _lines(path):
            completion = _completion(line)
            if completion is not None:
                tally.add(completion)
        return tally

    def figures(self, elapsed_s: float | None) -> dict[str, Any]:
        """Returns the counts and, once the clock has been stopped, rates and percentiles."""
        total_tokens = self.prompt_tokens + self.output_tokens
        figures: dict[str, Any] = {
            "completed": self.completed,
            "rejected": self.rejected,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "total_tokens": total_tokens,
        }
        # Of a run that was cut short only the early finishers are known: their percentiles would flatter it.
        if elapsed_s is not None and elapsed_s > 0:
            figures["requests_per_s"] = self.completed / elapsed_s
            figures["total_tokens_per_s"] = total_tokens / elapsed_s
            figures["output_tokens_per_s"] = self.output_tokens / elapsed_s
            for name, values in (("ttft", self.first_token_s), ("latency", self.finished_s)):
                figures[f"{name}_p50_s"] = percentile(values, 50)
                figures[f"{name}_p99_s"] = percentile(values, 99)
        return figures


# --- one run ---


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that the config alone settles, so that a run which fails at once has them too."""

    def get(group: str, key: str) -> Any:
        section = config.get(group)
        value = section.get(key) if isinstance(section, dict) else None
        return None if value == "auto" else value  # "auto" is known only once the device is

    return {
        "engine": get("engine", "name"),
        "model": get("model", "name"),
        "weights": get("model", "weights"),
        "dtype": get("model", "dtype"),
        "quantization": get("engine", "quantization"),
        "dataset": get("dataset", "name"),
        "stop": get("generation", "stop"),
        "tp": get("parallel", "tp"),
        "dp": get("parallel", "dp"),
    }


def _close(results_dir: Path, record: dict[str, Any], tally: _Tally, status: str, error: str | None) -> dict[str, Any]:
    """Completes ``record``, writes it and its row; returns the row."""
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is not one of {STATUSES}")
    elapsed_s = record.get("elapsed_s")
    record |= {"status": status, "error": error, "finished_at": _utc_now()}
    record |= dict.fromkeys(name for name in COLUMNS if name not in record)
    record |= tally.figures(elapsed_s)
    if record["git_commit"] is None:
        git = (record.get("environment") or {}).get("git") or {}
        record["git_commit"] = git.get("commit")
    row = {name: record[name] for name in COLUMNS}
    # In this order a failure in between leaves the run open to close_unfinished(), which adds no second row.
    append_row(results_dir, row)
    _replace(results_dir / record["run_id"] / "record.json", _json_bytes(record, indent=2))
    return row


def _utc_now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


class RunRecorder:
    """Owns one run directory and writes all of its files but ``run.log``. Made by :meth:`create`.

    A launching parent may create the directory before the ranks start; rank 0 then takes it over with the
    same run id and is the only writer from there on. The parent ends with :func:`close_unfinished`.
    """

    def __init__(self, results_dir: Path, record: dict[str, Any]) -> None:
        self.results_dir = results_dir
        self.run_id: str = record["run_id"]
        self.directory = results_dir / self.run_id
        self._record = record
        self._completions_path = self.directory / "completions.jsonl"
        self._tally = _Tally.of_file(self._completions_path)
        self._completions: int | None = None
        self._passes: int | None = None
        self._pending_passes: list[str] = []
        self._passes_flushed = time.monotonic()
        self._row: dict[str, Any] | None = None

    @classmethod
    def create(
        cls, results_dir: str | Path, run_id: str, config: dict[str, Any], command_line: list[str]
    ) -> RunRecorder:
        """Makes ``<results_dir>/<run_id>`` with ``config.yaml`` and a ``record.json`` that says "running".

        Args:
            results_dir: made if missing.
            run_id: from :func:`new_run_id`.
            config: the resolved config as plain data.
            command_line: as the user typed it; that of the parent stays when a directory is taken over.

        Raises:
            UserError: ``results_dir`` cannot be written, its ``runs.csv`` is not one, or the run is closed.
        """
        root, directory = Path(results_dir), run_directory(results_dir, run_id)
        config = plain(config)
        if not str(results_dir).strip():
            raise UserError("results_dir", "is empty", "name a directory")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            found = f"{quoted(str(results_dir))} cannot be written: {getattr(error, 'strerror', None) or error}"
            raise UserError("results_dir", found, "set another directory") from error
        _read_table(root / "runs.csv")  # better refused now than after the run
        earlier = read_record(root, run_id)
        remedy = "start the run under a new id"
        if earlier is None and (directory / "record.json").exists():
            raise UserError("run id", f"the record.json of {run_id} is damaged", remedy)
        if earlier is not None and earlier["status"] != RUNNING:
            raise UserError("run id", f"{run_id} is closed ({earlier['status']})", remedy)
        record = {
            "run_id": run_id,
            "started_at": _utc_now(),
            "status": RUNNING,
            **_from_config(config),
            "command_line": list(command_line),
            **(earlier or {}),
            "config": config,
            "config_hash": config_hash(config),
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
        }
        _replace(directory / "config.yaml", _yaml_bytes(config))
        recorder = cls(root, record)
        recorder.note()
        return recorder

    def note(self, **figures: Any) -> None:
        """Merges facts known early (columns or not) into the record and rewrites ``record.json``.

        Raises:
            UserError: the record cannot be written.
        """
        self._record |= plain(figures)
        _replace(self.directory / "record.json", _json_bytes(self._record, indent=2))

    def add(self, completion: Completion) -> None:
        """Appends one line to ``completions.jsonl``, on its way to the disk before this returns.

        Raises:
            UserError: the line cannot be written; the file then ends with the line before it.
        """
        # json writes the ids itself: plain() over each of them would cost the run's clock a second or two.
        entry = {field.name: getattr(completion, field.name) for field in fields(completion)}
        if entry["error"] is None:
            del entry["error"]
        try:
            if self._completions is None:
                _mend_last_line(self._completions_path)
                self._completions = _open_append(self._completions_path)
            _write_all(self._completions, _json_bytes(entry) + b"\n")
        except OSError as error:
            raise _cannot_write(self._completions_path, error) from error
        self._tally.add(entry)

    def add_pass(self, record: PassRecord) -> None:
        """Appends one forward pass to ``passes.csv``; written about once a second and by :meth:`finish`.

        Raises:
            UserError: the file cannot be written.
        """
        cells = (getattr(record, name) for name in PASS_COLUMNS)
        self._pending_passes.append(",".join(_cell(name, cell) for name, cell in zip(PASS_COLUMNS, cells, strict=True)))
        if time.monotonic() - self._passes_flushed >= PASSES_FLUSH_S:
            self._flush_passes()

    def _flush_passes(self) -> None:
        path = self.directory / "passes.csv"
        lines, self._pending_passes = self._pending_passes, []
        self._passes_flushed = time.monotonic()
        if not lines:
            return
        try:
            if self._passes is None:
                self._passes = _open_append(path)
                if os.fstat(self._passes).st_size == 0:
                    lines.insert(0, ",".join(PASS_COLUMNS))
            _write_all(self._passes, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise _cannot_write(path, error) from error

    def finish(self, status: str, error: str | None = None, **figures: Any) -> dict[str, Any]:
        """Closes the run: counts, rates, percentiles, ``record.json`` and one row in ``runs.csv``.

        Counts are of the completions on disk. Rates and percentiles need ``elapsed_s``. Percentiles are in
        seconds from the start of the clock, since all requests are there at its start; rejected ones have
        none. What is unknown stays None. Does nothing when the run is closed already.

        Args:
            status: one of :data:`STATUSES`.
            error: why a run is not ok.
            **figures: columns (``elapsed_s``, ``steps``, ...); all others go into ``record.json`` only.

        Returns:
            The row, one value for each of :data:`COLUMNS`.

        Raises:
            UserError: a file cannot be written.
        """
        if self._row is not None:
            return self._row
        on_disk = read_record(self.results_dir, self.run_id)
        if on_disk is not None and on_disk["status"] != RUNNING:
            self._row = {name: on_disk.get(name) for name in COLUMNS}
            return self._row
        self._record |= plain(figures)
        try:
            self._flush_passes()
        except UserError as failure:  # a table of passes is not worth the row of the run
            self._record["passes_error"] = str(failure)
        for descriptor in (self._completions, self._passes):
            if descriptor is not None:
                os.close(descriptor)
        self._completions = self._passes = None
        self._row = _close(self.results_dir, self._record, self._tally, status, error)
        return self._row


def _open_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)


def _mend_last_line(path: Path) -> None:
    """Ends the last line of a file taken over from a process that died while it wrote, or cuts it off."""
    last, size = b"", 0
    for _, last in _lines(path):
        size += len(last)
    if last and not last.endswith(b"\n"):
        with open(path, "r+b") as file:
            if _completion(last) is None:
                file.truncate(size - len(last))
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")


def close_unfinished(results_dir: str | Path, run_id: str, status: str, error: str | None) -> dict[str, Any] | None:
    """Closes a run whose ranks died without a word: for the process that launched them.

    Counts are of the completions on disk; the clock was never stopped, so that rates stay empty.

    Returns:
        The row, or None when the run is closed already or there is no such run.

    Raises:
        UserError: a file cannot be written.
    """
    record = read_record(results_dir, run_id)
    if record is None or record["status"] != RUNNING:
        return None
    root = Path(results_dir)
    return _close(root, record, _Tally.of_file(root / run_id / "completions.jsonl"), status, error)


# --- runs.csv ---


def _cell(name: str, value: Any) -> str:
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


def _read_table(path: Path) -> tuple[list[str], list[list[str]], str]:
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


def append_row(results_dir: str | Path, row: dict[str, Any]) -> None:
    """Appends one row to ``<results_dir>/runs.csv`` under a lock, so that concurrent runs lose nothing.

    A table with an older header is rewritten with the columns it lacks; foreign columns stay at the end. A
    run has one row: a second one with its ``run_id`` is not appended.

    Raises:
        UserError: the table cannot be locked, read or written.
    """
    root = Path(results_dir)
    path = Path(os.path.realpath(root / "runs.csv"))
    try:
        with filelock.FileLock(root / "runs.csv.lock", timeout=LOCK_TIMEOUT_S):
            header, rows, mend = _read_table(path)
            old = [dict(zip(header, cells, strict=False)) for cells in rows]
            if row["run_id"] in (cells.get("run_id") for cells in old):
                return
            if tuple(header[: len(COLUMNS)]) == COLUMNS:
                line = _csv_text([[_cell(name, row.get(name)) for name in header]])
                table = _open_append(path)
                try:
                    _write_all(table, (mend + line).encode("utf-8", errors="surrogateescape"))
                    os.fsync(table)
                finally:
                    os.close(table)
                return
            columns = [*COLUMNS, *(name for name in header if name not in COLUMNS)]
            kept = [[cells.get(name, "") for name in columns] for cells in old]
            text = _csv_text([columns, *kept, [_cell(name, row.get(name)) for name in columns]])
            _replace(path, text.encode("utf-8", errors="surrogateescape"))
    except filelock.Timeout as error:
        raise UserError(str(path), f"is locked for {LOCK_TIMEOUT_S:.0f} s", "end the process that holds it") from error
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise _cannot_write(path, error) from error


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Returns the rows of a ``runs.csv`` as text by column name; cells a torn or older row lacks are empty.

    Raises:
        UserError: there is no such file, or it is no table of runs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "run a job first, or name another runs.csv")
    header, rows, _ = _read_table(path)
    return [dict.fromkeys(header, "") | dict(zip(header, cells, strict=False)) for cells in rows]
