"""The directory of one run, and its name."""

from __future__ import annotations

import datetime
import json
import re
import secrets
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted

LAUNCH_LOG = "launch.log"  # what a launch printed, where a sweep has the terminal


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


def read_record(results_dir: str | Path, run_id: str) -> dict[str, Any] | None:
    """Returns the content of a run's ``record.json``; None when there is none, or it is not one."""
    path = run_directory(results_dir, run_id) / "record.json"
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "status" in record else None


def round_of(record: dict[str, Any]) -> tuple[str, int] | None:
    """Returns the series and the round of a run that a sweep, a search or ``repeat`` made; None of any other.

    Runs of one round were neighbours in time: their ratio is one of the same machine.
    """
    found = record.get("round")
    if not isinstance(found, dict):
        return None
    series, number = found.get("series"), found.get("number")
    return (series, number) if isinstance(series, str) and isinstance(number, int) else None
