"""What a terminal is shown while something runs, and how: rewritten lines, or plain ones where nobody looks on."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_S = 0.5
PLAIN_S = 5.0


class _Console(Console):
    """A console whose reader may leave, as ``head`` does: what is measured goes on, unseen."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Returns the terminal; a log file gets plain lines of a width that holds the summary."""
    return _Console(file=sys.stdout, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 110)


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


def duration(seconds: float) -> str:
    """Returns seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
