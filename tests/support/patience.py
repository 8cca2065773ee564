"""How long a test waits for what may never come back."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator
from types import FrameType

PATIENCE_S = 240  # for one example, of milliseconds, on a machine that may stall


@contextlib.contextmanager
def no_hang(seconds: float = PATIENCE_S) -> Iterator[None]:
    """Fails what takes longer; a library that lets no signal through ends the test session with its stack."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
