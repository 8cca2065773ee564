"""The one exception a user is meant to read."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

FULL_ERROR = "HYDRA_FULL_ERROR"
REFUSED = 2  # exit status
INTERRUPTED = 130  # exit status
PAUSED = 75  # exit status: what sysexits.h calls a temporary failure, to be tried again


class UserError(Exception):
    """Something the user can put right: printed as one line, exit status 2, never a traceback.

    Args:
        field: the config key, file or record concerned, e.g. ``parallel.tp`` or ``dataset.path, record 17``.
        found: what was found there, with the value.
        remedy: what to do about it.
    """

    def __init__(self, field: str, found: str, remedy: str = "") -> None:
        self.field = field
        self.found = found
        self.remedy = remedy
        super().__init__(one_line(f"{field}: {found}" + (f"; {remedy}" if remedy else "")))


def report(error: BaseException) -> int:
    """Prints ``error`` as one line on standard error, after its traceback if the user asked for that.

    Returns:
        The exit status for what a user has to put right.
    """
    show_traceback(error)
    complain(str(error))
    return REFUSED


def show_traceback(error: BaseException) -> None:
    """Prints where ``error`` came from, to a user who asked for that."""
    if os.environ.get(FULL_ERROR, "0") not in ("", "0"):
        traceback.print_exception(error)


def complain(line: str) -> None:
    """Prints ``line`` as an error on standard error."""
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Returns ``text`` with escapes in place of what a terminal would obey or cannot show; line ends are among it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str, limit: int = 600) -> str:
    """Returns ``text`` on one line, control characters escaped, cut at ``limit`` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def quoted(value: object, limit: int = 60) -> str:
    """Returns ``value`` as it can stand inside an error line: short, escaped, its type visible."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def full_error(value: str | None) -> Iterator[None]:
    """Sets whether Hydra shows tracebacks, for as long as the block lasts; None takes the variable away."""
    before = os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value
    try:
        yield
    finally:
        os.environ.pop(FULL_ERROR, None)
        if before is not None:
            os.environ[FULL_ERROR] = before
