"""What a terminal is shown while something runs, and how: rewritten lines, or plain ones where nobody looks on."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_S = 0.5
PLAIN_S = 5.0
PLAIN_WIDTH = 110  # of a log file or a pipe: holds the summary


class _Console(Console):
    """A console whose reader may leave, as ``head`` does: what is measured goes on, unseen."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Trimmed:
    """A stream that takes the blanks off the ends of lines: rich fills the cells of a table with them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes whole lines, as rich does."""
        self._stream.write(without_trailing_blanks(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def without_trailing_blanks(text: str) -> str:
    """Returns text with no blanks at the ends of its lines, for whoever reads it from a pipe or a file."""
    return re.sub(r"[ \t]+(?=\n)", "", text)


def console() -> Console:
    """Returns the terminal; a pipe or a log file gets plain lines of :data:`PLAIN_WIDTH`, not filled up to it."""
    if sys.stdout.isatty():
        return _Console(file=sys.stdout, highlight=False, emoji=False)
    trimmed = cast(TextIO, _Trimmed(sys.stdout))
    return _Console(file=trimmed, highlight=False, emoji=False, width=PLAIN_WIDTH)


class Steps:
    """Progress of something counted, outside the clock: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        what: is counted, such as ``requests judged``.
        stream: where it is shown.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self.what = what
        self.screen = _Console(file=stream, highlight=False)
        self.drawn = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> Steps:
        self.drawn = time.perf_counter()
        if self.screen.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(self.what), TimeElapsedColumn())
            self.bar = Progress(*columns, console=self.screen, transient=True)
            self.task = self.bar.add_task(self.what, total=None)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, of: int) -> None:
        """Shows that ``done`` of ``of`` are done, if the last line is long enough ago."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=of)
        elif time.perf_counter() - self.drawn >= PLAIN_S:
            self.drawn = time.perf_counter()
            self.screen.print(f"{done}/{of} {self.what}")
