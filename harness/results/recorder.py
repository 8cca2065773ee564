"""The directory of a run: ``record.json``, ``config.yaml``, ``completions.jsonl`` and ``passes.csv``.

Every file can be read after a crash at any moment: records are replaced atomically, and of a file that grows the last
line is torn at most. How a directory is opened is in ``opening``, its lines in ``appending``, changes of its record in
``amending``, its end in ``closing``; the table of all runs in ``table``, and how a run is resumed in ``segments``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.basics.files import leads, plain
from harness.basics.outcome import RUNNING
from harness.results import lifeline, opening
from harness.results.amending import settled, write_config, write_record, write_row
from harness.results.appending import CompletionsFile, PassesFile
from harness.results.closing import close
from harness.results.columns import COLUMNS
from harness.results.completions import Tally
from harness.results.directory import read_record
from harness.results.lock import LOCK
from harness.workload.records import Completion, PassRecord

LOOK_S = 0.5  # whether the run's files are there


class RunRecorder:
    """Owns one run directory and writes all of its files but ``run.log``. Made by :meth:`create` or :meth:`resume`.

    A launching parent may create the directory before the ranks start; rank 0 then takes it over with the
    same run id and is the only writer from there on. The parent ends with :func:`close_unfinished`.
    """

    def __init__(self, opened: opening.Opened) -> None:
        self.results_dir = opened.results_dir
        self.run_id: str = opened.record["run_id"]
        self.directory = self.results_dir / self.run_id
        self._record = opened.record
        self._lock = opened.lock
        self._written = opened.written
        self._completions = CompletionsFile(self.directory)
        self._passes = PassesFile(self.directory)
        self._row: dict[str, Any] | None = None
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
            claim: whether to keep others from resuming the run until :meth:`release`, for a launching parent.
            hold: whether to be the only process that writes the run, for rank 0.
            launcher: what the record must say of the parent, so that nobody else's run is taken over.

        Raises:
            UserError: ``results_dir`` cannot be written, its ``runs.csv`` is not one, or the run is closed, held or
                another launch's.
        """
        return cls(opening.create(results_dir, run_id, config, command_line, claim=claim, hold=hold, launcher=launcher))

    @classmethod
    def resume(
        cls, results_dir: str | Path, run_id: str, config: dict[str, Any], command_line: list[str]
    ) -> RunRecorder:
        """Takes over a run that did not finish, to resume it; the caller has its lock from here on.

        Nothing is written before the first :meth:`note`, so that a run which is refused after all stays as it was.

        Raises:
            UserError: there is no such run, it is complete, its files are damaged, or another process has it.
        """
        return cls(opening.resume(results_dir, run_id, config, command_line))

    def write_alone(self) -> None:
        """Keeps every other process from writing the run, until this one ends or calls :meth:`release`."""
        opening.hold(self._lock, self.results_dir, self.run_id, LOCK)

    def release(self, *locks: str) -> None:
        """Lets another process write this run, or gives back only some of what is held."""
        self._lock.release(*locks)

    def clock_started(self, clock_s: float) -> None:
        """Notes where this process's clock begins, for those who see its end if it cannot tell of it."""
        lifeline.begun(self.directory, len(self._record.get("segments", [])), clock_s)

    def gone(self) -> UserError | None:
        """Returns what is to be said when the run's files are no longer where they were; None as long as they are."""
        lost = self._completions.lost()
        if not leads(self.directory):
            path = self.directory
        elif lost:
            path = self._completions.path
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
        """Returns the completions on disk, each request's once; raises UserError if the file is damaged."""
        return self._completions.read()

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
    def closed(self) -> bool:
        """Whether this process has closed the run, so that its row is written."""
        return self._row is not None

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
        if self._written:  # else note() writes it
            write_config(self.directory, config)
        self.note(**settled(self._record, config), **figures)

    def note(self, **figures: Any) -> None:
        """Merges facts known early (columns or not) into the record and rewrites ``record.json``.

        Raises:
            UserError: the record cannot be written.
        """
        self._record |= plain(figures)
        if not self._written:
            write_config(self.directory, self._record["config"])
        write_record(self.directory, self._record)
        if not self._written:
            lifeline.forget(self.directory)  # the segment before this one's, which the record has now
            self._written = True

    def add(self, completion: Completion) -> None:
        """Appends one line to ``completions.jsonl``, on its way to the disk before this returns.

        Raises:
            UserError: the line cannot be written; the file then ends with the line before it.
        """
        self._completions.add(completion)

    def add_pass(self, record: PassRecord) -> None:
        """Appends one forward pass to ``passes.csv``; written about once a second and by :meth:`finish`.

        Raises:
            UserError: the file cannot be written.
        """
        self._passes.add(record)

    def finish(
        self, status: str, error: str | None = None, *, expected: int | None = None, **figures: Any
    ) -> dict[str, Any]:
        """Closes the run: counts, rates, percentiles, ``record.json`` and one row in ``runs.csv``.

        Counts are of the completions on disk. Rates and percentiles need ``elapsed_s``. Percentiles are in
        seconds from the start of the clock, since all requests are there at its start; rejected ones have
        none. What is unknown stays None. Does nothing when the run is closed already, or was to be resumed and has
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
        if not self._written:
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
            self._passes.close()
        except UserError as failure:  # a table of passes is not worth the row of the run
            self._record["passes_error"] = str(failure)
        self._completions.close()
        # Read back: a signal may have ended the run between a line's writing and whatever would have counted it.
        tally = Tally.of_file(self._completions.path)
        self._row = close(self.results_dir, self._record, tally, status, error, expected)
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
        self._row = write_row(self.results_dir, self._record)
        return self._row
