"""What the commands have in common: argparse that refuses in one line, checks of numbers, output that may fail."""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

from harness.basics.errors import UserError, quoted, report


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError in place of printing its usage, and takes no abbreviated options."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        called = Path(sys.argv[0]).name
        prog = called if called.startswith("llama-harness-") else prog  # as an installed command
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the command after its help, which a reader may have seen enough of."""
        try:
            sys.stdout.flush()
        except OSError as error:
            status = output_ended(error)
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError("command line", message, "see --help")


def whole(text: str) -> int:
    """Returns an option's value as a whole number of at least 0; raises argparse's error."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """Returns an option's value as a whole number of at least 1; raises argparse's error."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of at least 1")
    return number


def not_negative(text: str) -> float:
    """Returns an option's value as a finite number of at least 0; raises argparse's error."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of at least 0")
    return number


def collect_seldom() -> None:
    """Has Python look for garbage seldom; for processes that import torch and transformers.

    These leave a million objects, and to look at all of them again and again takes a second of every start.
    """
    gc.set_threshold(500_000, 20, 50)


def show_any_text() -> None:
    """Has the output show a code for what a terminal cannot show, such as a model's name."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def output_ended(error: OSError) -> int:
    """Returns the exit status of a command whose standard output takes no more.

    The reader of a pipe may have seen enough, as in ``| head``, which is no error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more
    if isinstance(error, BrokenPipeError):
        return 0
    return report(UserError("standard output", f"cannot be written: {error.strerror}", "free space"))
