"""The clock of a run, the time of day, and times as people read them."""

from __future__ import annotations

import datetime
import time


class Clock:
    """Seconds since the run started, on this host's monotonic clock.

    Args:
        already: seconds that earlier segments of a resumed run took.
    """

    def __init__(self, already: float = 0.0) -> None:
        self.started = time.perf_counter() - already

    def __call__(self) -> float:
        return time.perf_counter() - self.started


class VirtualClock(Clock):
    """A clock that stands still until it is set: that of a simulation.

    Args:
        already: as of :class:`Clock`.
    """

    def __init__(self, already: float = 0.0) -> None:
        self.now_s = already

    def __call__(self) -> float:
        return self.now_s


def utc_now() -> str:
    """Returns the time as it stands in records."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def duration(seconds: float) -> str:
    """Returns seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
