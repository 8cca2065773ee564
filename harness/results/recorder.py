"""The directory of a run: ``record.json``, ``config.yaml``, ``completions.jsonl`` and ``passes.csv``.

Every file can be read after a crash at any moment: records are replaced atomically, and a completion is one
write of one line, so that at most the last line is torn. The table of all runs is in ``runs_table``, how a run
is gone on with in ``segments``.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from harness.basics.cells import cell_text
from harness.basics.clock import utc_now
from harness.basics.errors import UserError, one_line, quoted
from harness.basics.files import (
    cannot_write,
    cut_torn_line,
    json_bytes,
    leads,
    open_append,
    plain,
    replace,
    write_all,
    yaml_bytes,
)
from harness.basics.outcome import RUNNING
from harness.config.identity import config_hash
from harness.results import lifeline, segments
from harness.results.appending import PASSES_FLUSH_S, _close_file
from harness.results.closing import _close
from harness.results.columns import COLUMNS, columns_from_config
from harness.results.completions import Tally, mend_last_line, read_completions
from harness.results.directory import read_record, run_directory
from harness.results.lock import LAUNCH_LOCK, LOCK, RunLock
from harness.results.table import put_row, read_table
from harness.workload.records import PASS_COLUMNS, Completion, PassRecord

LOOK_S = 0.5  # whether the run's files are there


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
        self._begun = True
        self._lock = RunLock(self.directory)
        self._completions: int | None = None
        self._passes: int | None = None
        self._pending_passes: list[str] = []
        self._steps_before = 0
        self._passes_flushed = time.monotonic()
        self._row: dict[str, Any] | None = None
        self._files = threading.Lock()  # between closing the files and looking whether they are there
        self._closing = threading.Event()

    @classmethod
    def create(
        cls,
        results_dir: str | Path,
        run_id: str,
        config: dict[str, Any],
        command_line: list[str],
        *,
        claim: bool = False,
        hold: bool = False,
        launcher: list[Any] | None = None,
    ) -> RunRecorder:
        """Makes ``<results_dir>/<run_id>`` with ``config.yaml`` and a ``record.json`` that says "running".

        Args:
            results_dir: made if missing.
            run_id: from :func:`new_run_id`.
            config: the resolved config as plain data.
            command_line: as the user typed it; that of the parent stays when a directory is taken over.
            claim: whether to keep others from going on with the run until :meth:`release`, for a launching parent.
            hold: whether to be the only process that writes the run, for rank 0.
            launcher: what the record must say of the parent, so that nobody else's run is taken over.

        Raises:
            UserError: ``results_dir`` cannot be written, its ``runs.csv`` is not one, or the run is closed, held or
                another launch's.
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
        recorder = cls(root, {"run_id": run_id})
        recorder._hold(*[LAUNCH_LOCK] * claim, *[LOCK] * hold)
        read_table(root / "runs.csv")  # better refused now than after the run
        earlier = read_record(root, run_id)
        remedy = "start the run under a new id"
        if earlier is None and (directory / "record.json").exists():
            raise UserError("run id", f"the record.json of {run_id} is damaged", remedy)
        if earlier is not None and earlier["status"] != RUNNING:
            raise UserError("run id", f"{run_id} is closed ({earlier['status']})", remedy)
        if launcher is not None and (earlier or {}).get("launcher") != launcher:
            raise UserError("run id", f"{run_id} is another launch's by now", "let that one end it")
        recorder._record = {
            "run_id": run_id,
            "started_at": utc_now(),
            "status": RUNNING,
            **columns_from_config(config),
            "command_line": list(command_line),
            **(earlier or {}),
            "config": config,
            "config_hash": config_hash(config),
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "clock_boot": lifeline.boot(),
        }
        replace(directory / "config.yaml", yaml_bytes(config))
        recorder._steps_before = int(max(segments.last_rows(directory / "passes.csv", ("step",)), default=0))
        recorder.note()
        return recorder

    @classmethod
    def resume(
        cls, results_dir: str | Path, run_id: str, config: dict[str, Any], command_line: list[str]
    ) -> RunRecorder:
        """Takes over a run that did not finish, to go on with it; the caller has its lock from here on.

        Nothing is written before the first :meth:`note`, so that a run which is refused after all stays as it was.

        Raises:
            UserError: there is no such run, it is complete, its files are damaged, or another process has it.
        """
        root, directory = Path(results_dir), run_directory(results_dir, run_id)
        if read_record(root, run_id) is None:
            if not directory.is_dir():
                remedy = "take a run id from the first column of runs.csv, or set results_dir"
                raise UserError("resume", f"no run {run_id} in {quoted(str(results_dir), 300)}", remedy)
            raise UserError("resume", f"the record.json of {run_id} is missing or damaged", "start a new run")
        read_table(root / "runs.csv")
        recorder = cls(root, {"run_id": run_id})
        recorder._hold(LAUNCH_LOCK, LOCK)
        try:
            earlier = read_record(root, run_id) or {}  # what another process wrote while we waited
            if earlier.get("status") == "ok":
                raise UserError("resume", f"{run_id} is complete", "start a new run")
            if earlier.get("status") == "invalid" and earlier.get("rejected"):
                found = f"all requests of {run_id} were rejected: {one_line(str(earlier.get('error')), 200)}"
                raise UserError("resume", found, "start a new run")
            if wrong := (earlier.get("parity") or {}).get("wrong"):
                raise UserError("resume", f"{wrong} of the outputs of {run_id} were found wrong", "start a new run")
            try:
                mend_last_line(recorder._completions_path)
            except OSError as error:
                raise cannot_write(recorder._completions_path, error) from error
            recorder._steps_before = int(max(segments.last_rows(directory / "passes.csv", ("step",)), default=0))
            done = recorder.done()
            recorder._record = segments.begin(
                earlier,
                directory,
                len(done),
                {
                    **columns_from_config(plain(config)),
                    "config": plain(config),
                    "config_hash": config_hash(config),
                    "pid": os.getpid(),
                    "hostname": socket.gethostname(),
                    "clock_boot": lifeline.boot(),
                },
                list(command_line),
            )
            recorder._begun = False
        except BaseException:
            recorder.release()
            raise
        return recorder

    def _hold(self, *locks: str) -> None:
        self._lock.hold(*locks, pid=(read_record(self.results_dir, self.run_id) or {}).get("pid") if locks else None)

    def write_alone(self) -> None:
        """Keeps every other process from writing the run, until this one ends or calls :meth:`release`."""
        self._hold(LOCK)

    def release(self, *locks: str) -> None:
        """Lets another process write this run, or gives back only some of what is held."""
        self._lock.release(*locks)

    def clock_started(self, clock_s: float) -> None:
        """Notes where this process's clock begins, for those who see its end if it cannot tell of it."""
        lifeline.begun(self.directory, len(self._record.get("segments", [])), clock_s)

    def gone(self) -> UserError | None:
        """Returns what is to be said when the run's files are no longer where they were; None as long as they are."""
        with self._files:
            lost = self._completions is not None and not leads(self._completions_path, self._completions)
        if not leads(self.directory):
            path = self.directory
        elif lost:
            path = self._completions_path
        else:
            return None
        remedy = f"if it was moved, move it back: resume={self.run_id} does the rest; if not, start a new run"
        return UserError(str(path), "was deleted or moved during the run", remedy)

    def watch_files(self, lost: Callable[[], None]) -> None:
        """Has ``lost`` called, from a thread, when :meth:`gone` finds something, until :meth:`finish`."""

        def watch() -> None:
            missed = 0
            while not self._closing.wait(LOOK_S):
                missed = missed + 1 if self.gone() is not None else 0
                if missed == 2:  # a network's file system may lose sight of it for a moment
                    lost()
                    return

        threading.Thread(target=watch, name="files", daemon=True).start()

    def done(self) -> list[Completion]:
        """Returns the completions on disk, each request's once.

        Raises:
            UserError: the file is damaged, or has a request twice.
        """
        if not self._completions_path.is_file():
            return []
        found = read_completions(self._completions_path)
        by_index = {entry.get("index"): entry for entry in found}
        if len(by_index) != len(found) or not all(type(index) is int for index in by_index):
            raise UserError(str(self._completions_path), "has a request twice", "the file was edited or damaged")
        try:
            return [Completion(**entry) for entry in found]
        except TypeError as error:
            raise UserError(str(self._completions_path), f"is not ours: {error}", "start a new run") from error

    def check_work(self, **facts: Any) -> None:
        """Raises UserError if what is to be run now is other work than the run's earlier segments were."""
        for name, value in self._record.get("work", {}).items():
            if name in facts and facts[name] != value:
                found = f"{name} is {quoted(facts[name])}, and was {quoted(value)} when the run began"
                raise UserError("resume", found, "restore what it was, or start a new run")

    @property
    def clock_s(self) -> float:
        """Where the run's clock begins: 0, or where that of the earlier segments was when they ended."""
        return float(self._record.get("segment", {}).get("clock_from_s", 0.0))

    @property
    def record(self) -> dict[str, Any]:
        """What ``record.json`` says, as far as this process wrote it."""
        return self._record

    def settle(self, config: dict[str, Any], **figures: Any) -> None:
        """Notes ``figures``, and the config as it is now that all of it is known.

        Raises:
            UserError: a file cannot be written.
        """
        config = plain(config)
        if self._begun:  # else note() writes it
            replace(self.directory / "config.yaml", yaml_bytes(config))
        if (segment := self._record.get("segment")) is not None:
            segment["changed"] = segments.changed(self._record["segments"][-1].get("config", {}), config)
        columns = {name: value for name, value in columns_from_config(config).items() if name in ("tp", "dp")}
        self.note(**columns, config=config, config_hash=config_hash(config), **figures)

    def note(self, **figures: Any) -> None:
        """Merges facts known early (columns or not) into the record and rewrites ``record.json``.

        Raises:
            UserError: the record cannot be written.
        """
        self._record |= plain(figures)
        if not self._begun:
            replace(self.directory / "config.yaml", yaml_bytes(self._record["config"]))
        replace(self.directory / "record.json", json_bytes(self._record, indent=2))
        if not self._begun:
            lifeline.forget(self.directory)  # the segment before this one's, which the record has now
            self._begun = True

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
                mend_last_line(self._completions_path)
                self._completions = open_append(self._completions_path)
            write_all(self._completions, json_bytes(entry) + b"\n")
        except OSError as error:
            raise cannot_write(self._completions_path, error) from error

    def add_pass(self, record: PassRecord) -> None:
        """Appends one forward pass to ``passes.csv``; written about once a second and by :meth:`finish`.

        Raises:
            UserError: the file cannot be written.
        """
        record.step += self._steps_before
        self._pending_passes.append(",".join(cell_text(name, getattr(record, name)) for name in PASS_COLUMNS))
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
                cut_torn_line(path)
                self._passes = open_append(path)
                if os.fstat(self._passes).st_size == 0:
                    lines.insert(0, ",".join(PASS_COLUMNS))
            write_all(self._passes, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise cannot_write(path, error) from error

    def finish(
        self, status: str, error: str | None = None, *, expected: int | None = None, **figures: Any
    ) -> dict[str, Any]:
        """Closes the run: counts, rates, percentiles, ``record.json`` and one row in ``runs.csv``.

        Counts are of the completions on disk. Rates and percentiles need ``elapsed_s``. Percentiles are in
        seconds from the start of the clock, since all requests are there at its start; rejected ones have
        none. What is unknown stays None. Does nothing when the run is closed already, or was to be gone on with and has
        not begun again.

        Args:
            status: one of :data:`STATUSES`.
            error: why a run is not ok.
            expected: lines that ``completions.jsonl`` must have if the run is ok; it is ``failed`` otherwise.
            **figures: columns (``elapsed_s``, ``steps``, ...); all others go into ``record.json`` only.

        Returns:
            The row, one value for each of :data:`COLUMNS`.

        Raises:
            UserError: a file cannot be written.
        """
        if self._row is not None:
            return self._row
        if not self._begun:
            return {name: self._record.get(name) for name in COLUMNS}
        on_disk = read_record(self.results_dir, self.run_id)
        if on_disk is not None and on_disk["status"] != RUNNING:
            self._row = {name: on_disk.get(name) for name in COLUMNS}
            return self._row
        self._closing.set()
        if (gone := self.gone()) is not None:
            if not leads(self.directory):
                raise gone  # a new one with half of the files would be worse than none
            status, error = "failed", str(gone)
        self._record |= plain(figures)
        try:
            self._flush_passes()
        except UserError as failure:  # a table of passes is not worth the row of the run
            self._record["passes_error"] = str(failure)
        with self._files:
            completions, passes = self._completions, self._passes
            self._completions = self._passes = None
        try:
            _close_file(passes)
        except OSError as failure:
            self._record["passes_error"] = str(cannot_write(self.directory / "passes.csv", failure))
        try:
            _close_file(completions)
        except OSError as failure:
            raise cannot_write(self._completions_path, failure) from failure
        # Read back: a signal may have ended the run between a line's writing and whatever would have counted it.
        self._row = _close(
            self.results_dir, self._record, Tally.of_file(self._completions_path), status, error, expected
        )
        return self._row

    def amend(self, status: str, error: str | None, **figures: Any) -> dict[str, Any]:
        """Changes the record and the row of a run that this process has closed, and returns the row.

        Args:
            status, error, **figures: as for :meth:`finish`; what is not given stays.

        Raises:
            UserError: a file cannot be written.
        """
        assert self._row is not None
        if (gone := self.gone()) is not None:
            raise gone
        self._record |= plain(figures) | {"status": status, "error": error}
        self._row = {name: self._record[name] for name in COLUMNS}
        put_row(self.results_dir, self._row)
        replace(self.directory / "record.json", json_bytes(self._record, indent=2))
        return self._row
