"""How a run can end."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

STATUSES = ("ok", "failed", "oom", "timeout", "interrupted", "invalid")
RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Fault:
    """How a run ended: its ``status`` and ``error`` in ``runs.csv``, and the exit status."""

    status: str
    error: str
    exit_status: int


def leave(status: int) -> NoReturn:
    """Ends this process when all of its files are closed.

    Python would take torch's modules apart one by one first, for a second and to no end; what was registered to be
    done at the end of the process is done.
    """
    if "torch" not in sys.modules:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
