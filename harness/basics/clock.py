"""The clock of a run, and the time of day."""

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


def utc_now() -> str:
    """Returns the time as it stands in records."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
