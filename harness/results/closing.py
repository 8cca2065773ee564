"""Closes a run: its counts, its record and its row, by rank 0 or, where that could not, by whoever launched it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filelock

from harness.basics.clock import utc_now
from harness.basics.outcome import RUNNING, STATUSES
from harness.results import disturbance, lifeline, segments
from harness.results.amending import write_row
from harness.results.columns import COLUMNS
from harness.results.completions import Tally
from harness.results.directory import read_record
from harness.results.efficiency import efficiency
from harness.results.lock import LOCK
from harness.results.passes import pass_figures

CLOSE_TIMEOUT_S = 2.0


def close(
    results_dir: Path,
    record: dict[str, Any],
    tally: Tally,
    status: str,
    error: str | None,
    expected: int | None = None,
) -> dict[str, Any]:
    """Completes ``record``, writes it and its row; returns the row.

    Args:
        record: of the run; as it was where this fails, so that it can be tried again.
        tally: of its ``completions.jsonl``.
        status: one of :data:`STATUSES`.
        error: why it is not ok.
        expected: lines that ``completions.jsonl`` must have if the run is ok; it is ``failed`` otherwise.

    Raises:
        UserError: a file cannot be written.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is not one of {STATUSES}")
    lines = tally.completed + tally.rejected
    if status == "ok" and expected not in (None, lines):
        status, error = "failed", f"completions.jsonl has {lines} lines for {expected} requests"
    unfinished = record
    record = unfinished | {"status": status, "error": error, "finished_at": utc_now()}
    resumed = []
    if "segments" in record:
        record["segments"] = list(record["segments"])
        segments.end(record, results_dir / record["run_id"], lines)
        record |= segments.whole_run(record)
        resumed = [segments.note(record)]
    record |= dict.fromkeys(name for name in COLUMNS if name not in record)
    record |= tally.figures(record["elapsed_s"])
    record |= efficiency(record)
    record["notes"] = [*(record.get("notes") or []), *disturbance.notes(record), *resumed]
    record["passes"] = pass_figures(results_dir / record["run_id"] / "passes.csv")
    if record["git_commit"] is None:
        git = (record.get("environment") or {}).get("git") or {}
        record["git_commit"] = git.get("commit")
    row = write_row(results_dir, record)
    if record.get("clock_s", record["elapsed_s"]) is not None or "segments" in record:
        lifeline.forget(results_dir / record["run_id"])
    unfinished.clear()
    unfinished.update(record)
    return row


def close_unfinished(
    results_dir: str | Path, run_id: str, status: str, error: str | None, **owner: Any
) -> dict[str, Any] | None:
    """Closes a run whose ranks died before they could: for the process that launched them.

    Counts are of the completions on disk; the clock was never stopped, so that rates stay empty.

    Args:
        **owner: what the record must say for the run to be the caller's still; somebody may have resumed it.

    Returns:
        The row, or None when the run is closed already or another's, or there is no such run.

    Raises:
        UserError: a file cannot be written.
    """
    root = Path(results_dir)
    record = read_record(results_dir, run_id)
    if record is None or record["status"] != RUNNING:
        return None
    lock = filelock.FileLock(root / run_id / LOCK)
    try:
        lock.acquire(timeout=CLOSE_TIMEOUT_S)
    except filelock.Timeout:
        return None  # somebody else resumes it
    except (OSError, NotImplementedError):  # a full disk, or a file system without locks
        pass
    try:
        record = read_record(results_dir, run_id)
        if record is None or record["status"] != RUNNING or any(record.get(key) != owner[key] for key in owner):
            return None
        return close(root, record, Tally.of_file(root / run_id / "completions.jsonl"), status, error)
    finally:
        lock.release()
