"""The files of a run that grow line by line: ``completions.jsonl`` and ``passes.csv``.

A completion is one write of one line, so that a crash at any moment tears the last line at most.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from harness.basics.cells import cell_text
from harness.basics.errors import UserError
from harness.basics.files import cannot_write, json_bytes, leads, mend_last_line, numbered_lines, open_append, write_all
from harness.results import segments
from harness.results.completions import parsed, read_completions
from harness.workload.records import PASS_COLUMNS, Completion, PassRecord

COMPLETIONS, PASSES = "completions.jsonl", "passes.csv"
PASSES_FLUSH_S = 1.0


class LineFile:
    """A file that one process appends lines to; opened, and its last line mended, when the first is written.

    Args:
        path: made if missing.
        header: its first line; none by default.
        is_whole: whether a line that only lacks its end is one, see :func:`mend_last_line`.
    """

    def __init__(self, path: Path, header: bytes = b"", is_whole: Callable[[bytes], bool] | None = None) -> None:
        self.path = path
        self._header = header
        self._is_whole = is_whole
        self._descriptor: int | None = None
        self._closing = threading.Lock()  # between closing the file and looking whether it is there

    def mend(self) -> None:
        """Mends a last line that a process which died left torn; raises UserError."""
        try:
            mend_last_line(self.path, self._is_whole)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, lines: bytes) -> None:
        """Appends whole lines, on their way to the disk before this returns.

        Raises:
            UserError: they cannot be written; the file then ends with the line before them.
        """
        try:
            if self._descriptor is None:
                mend_last_line(self.path, self._is_whole)
                self._descriptor = open_append(self.path)
                if os.fstat(self._descriptor).st_size == 0:
                    lines = self._header + lines
            write_all(self._descriptor, lines)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def lost(self) -> bool:
        """Returns whether the file that is open here is no longer the one at its path."""
        with self._closing:
            return self._descriptor is not None and not leads(self.path, self._descriptor)

    def close(self) -> None:
        """Closes the file once its content outlasts a power cut, since the row will say that it is there.

        Raises:
            UserError: the disk does not take it.
        """
        with self._closing:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a special file, or a file system that knows of no such thing
                raise cannot_write(self.path, error) from error
        finally:
            os.close(descriptor)


class CompletionsFile(LineFile):
    """The ``completions.jsonl`` of a run.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / COMPLETIONS, is_whole=lambda line: parsed(line) is not None)

    def add(self, completion: Completion) -> None:
        """Appends one line; raises UserError as :meth:`append` does."""
        # json writes the ids itself: plain() over each of them would cost the run's clock a second or two.
        entry = {field.name: getattr(completion, field.name) for field in fields(completion)}
        for name in ("error", "id", "shared_tokens"):
            if entry[name] is None:
                del entry[name]
        self.append(json_bytes(entry) + b"\n")

    def read(self) -> list[Completion]:
        """Returns the completions on disk, each request's once.

        Raises:
            UserError: the file is damaged, or has a request twice.
        """
        if not self.path.is_file():
            return []
        found = read_completions(self.path)
        by_index = {entry.get("index"): entry for entry in found}
        if len(by_index) != len(found) or not all(type(index) is int for index in by_index):
            raise UserError(str(self.path), "has a request twice", "the file was edited or damaged")
        try:
            return [Completion(**entry) for entry in found]
        except TypeError as error:
            raise UserError(str(self.path), f"is not ours: {error}", "start a new run") from error


class PassesFile(LineFile):
    """The ``passes.csv`` of a run, written about once a second; steps are counted on over the segments of the run.

    A run that an older version began keeps the columns that its file has.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / PASSES, header=(",".join(PASS_COLUMNS) + "\n").encode())
        there = next((line.decode(errors="replace").strip() for _, line in numbered_lines(self.path)), "").split(",")
        self._columns = tuple(there) if set(there) <= set(PASS_COLUMNS) else PASS_COLUMNS
        self._steps_before = int(max(segments.last_rows(self.path, ("step",)), default=0))
        self._pending: list[str] = []
        self._flushed = time.monotonic()

    def add(self, record: PassRecord) -> None:
        """Adds one forward pass; raises UserError if those of the last second cannot be written."""
        record.step += self._steps_before
        self._pending.append(",".join(cell_text(name, getattr(record, name)) for name in self._columns))
        if time.monotonic() - self._flushed >= PASSES_FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added; raises UserError, and what could not be written is dropped."""
        lines, self._pending = self._pending, []
        self._flushed = time.monotonic()
        if lines:
            self.append(("\n".join(lines) + "\n").encode())

    def close(self) -> None:
        """Writes what has been added and closes the file; raises UserError."""
        try:
            self.flush()
        finally:
            super().close()
