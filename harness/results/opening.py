"""Opens the directory of a run for the one process that writes it: of a new run, or of one that is resumed."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.basics.clock import utc_now
from harness.basics.errors import UserError, one_line, quoted
from harness.basics.files import plain
from harness.basics.outcome import RUNNING
from harness.config.identity import config_hash
from harness.results import lifeline, segments
from harness.results.amending import write_config, write_record
from harness.results.appending import CompletionsFile
from harness.results.columns import columns_from_config
from harness.results.directory import read_record, run_directory
from harness.results.lock import LAUNCH_LOCK, LOCK, RunLock
from harness.results.table import read_table


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that this process may write.

    Attributes:
        record: what it begins with.
        lock: this process's hold on it, with what was asked for taken.
        written: whether the directory has the record and its config already.
    """

    results_dir: Path
    record: dict[str, Any]
    lock: RunLock
    written: bool


def create(
    results_dir: str | Path,
    run_id: str,
    config: dict[str, Any],
    command_line: list[str],
    *,
    claim: bool = False,
    hold: bool = False,
    launcher: list[Any] | None = None,
) -> Opened:
    """Makes ``<results_dir>/<run_id>`` with ``config.yaml`` and a ``record.json`` that says "running".

    Args: see :meth:`harness.results.recorder.RunRecorder.create`.

    Raises:
        UserError: as there.
    """
    root, directory = Path(results_dir), run_directory(results_dir, run_id)
    config = plain(config)
    _make(results_dir, directory)
    lock = _hold(root, run_id, *[LAUNCH_LOCK] * claim, *[LOCK] * hold)
    read_table(root / "runs.csv")  # better refused now than after the run
    earlier = _begun_by_launcher(root, run_id, launcher)
    record = {
        "run_id": run_id,
        "started_at": utc_now(),
        "status": RUNNING,
        **columns_from_config(config),
        "command_line": list(command_line),
        **earlier,
        **_of_this_process(config),
    }
    write_config(directory, config)
    write_record(directory, record)
    return Opened(root, record, lock, written=True)


def resume(results_dir: str | Path, run_id: str, config: dict[str, Any], command_line: list[str]) -> Opened:
    """Takes over a run that did not finish, to resume it; nothing but a torn line is changed in its directory yet.

    Raises:
        UserError: there is no such run, it is complete, its files are damaged, or another process has it.
    """
    root, directory = Path(results_dir), run_directory(results_dir, run_id)
    config = plain(config)
    if read_record(root, run_id) is None:
        if not directory.is_dir():
            remedy = "take a run id from the first column of runs.csv, or set results_dir"
            raise UserError("resume", f"no run {run_id} in {quoted(str(results_dir), 300)}", remedy)
        raise UserError("resume", f"the record.json of {run_id} is missing or damaged", "start a new run")
    read_table(root / "runs.csv")
    lock = _hold(root, run_id, LAUNCH_LOCK, LOCK)
    try:
        earlier = read_record(root, run_id) or {}  # what another process wrote while we waited
        refuse_to_resume(run_id, earlier)
        completions = CompletionsFile(directory)
        completions.mend()
        figures = columns_from_config(config) | _of_this_process(config)
        record = segments.begin(earlier, directory, len(completions.read()), figures, list(command_line))
    except BaseException:
        lock.release()
        raise
    return Opened(root, record, lock, written=False)


def hold(lock: RunLock, results_dir: Path, run_id: str, *names: str) -> None:
    """Takes locks of a run, for the process that the record names if another has them; raises UserError."""
    lock.hold(*names, pid=(read_record(results_dir, run_id) or {}).get("pid") if names else None)


def _hold(root: Path, run_id: str, *names: str) -> RunLock:
    lock = RunLock(run_directory(root, run_id))
    hold(lock, root, run_id, *names)
    return lock


def _make(results_dir: str | Path, directory: Path) -> None:
    if not str(results_dir).strip():
        raise UserError("results_dir", "is empty", "name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = f"{quoted(str(results_dir))} cannot be written: {getattr(error, 'strerror', None) or error}"
        raise UserError("results_dir", found, "set another directory") from error


def _begun_by_launcher(root: Path, run_id: str, launcher: list[Any] | None) -> dict[str, Any]:
    """Returns the record of a directory that our launcher made; empty for a new one.

    Raises:
        UserError: the run is closed, damaged or another launch's.
    """
    earlier = read_record(root, run_id)
    remedy = "start the run under a new id"
    if earlier is None and (root / run_id / "record.json").exists():
        raise UserError("run id", f"the record.json of {run_id} is damaged", remedy)
    if earlier is not None and earlier["status"] != RUNNING:
        raise UserError("run id", f"{run_id} is closed ({earlier['status']})", remedy)
    if launcher is not None and (earlier or {}).get("launcher") != launcher:
        raise UserError("run id", f"{run_id} is another launch's by now", "let that one end it")
    return earlier or {}


def refuse_to_resume(run_id: str, earlier: dict[str, Any]) -> None:
    """Raises UserError of a run that is complete, or whose tokens or requests no further segment would mend."""
    if earlier.get("status") == "ok":
        raise UserError("resume", f"{run_id} is complete", "start a new run")
    if earlier.get("status") == "invalid" and earlier.get("rejected"):
        found = f"all requests of {run_id} were rejected: {one_line(str(earlier.get('error')), 200)}"
        raise UserError("resume", found, "start a new run")
    if wrong := (earlier.get("parity") or {}).get("wrong"):
        raise UserError("resume", f"{wrong} of the outputs of {run_id} were found wrong", "start a new run")


def _of_this_process(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what the record says of the process that writes it, and of the config that it was given."""
    return {
        "config": config,
        "config_hash": config_hash(config),
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "clock_boot": lifeline.boot(),
    }
