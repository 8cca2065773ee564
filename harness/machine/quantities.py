"""Measured quantities: their samples summed up, over all of a run or over its clock."""

from __future__ import annotations


class Quantity:
    """A quantity over time: its extremes over all samples, its mean over those within the clock."""

    def __init__(self) -> None:
        self.peak: float | None = None
        self.least: float | None = None
        self._area = self._seconds = 0.0
        self._last: tuple[float, float] | None = None

    def add(self, time_s: float | None, value: float | None) -> None:
        """Takes one sample; ``time_s`` is None outside the clock."""
        if value is None:
            self._last = None
            return
        self.peak = value if self.peak is None else max(self.peak, value)
        self.least = value if self.least is None else min(self.least, value)
        if time_s is None:
            return
        if self._last is not None:
            seconds = time_s - self._last[0]
            self._area += (value + self._last[1]) / 2 * seconds
            self._seconds += seconds
        self._last = (time_s, value)

    @property
    def mean(self) -> float | None:
        """The mean over the clock, each sample weighted by the time around it."""
        return self._area / self._seconds if self._seconds > 0 else None


class RisingCounter:
    """A counter that only rises (joules, seconds of work), from the start of the clock on."""

    def __init__(self) -> None:
        self.since: float | None = None  # the clock's start; None before it, and once a reading was missing
        self._base: float | None = None
        self._broken = False

    def add(self, time_s: float | None, value: float | None) -> None:
        """Takes one sample; ``time_s`` is None outside the clock."""
        if time_s is None:
            return
        if value is None or self._broken:
            self.since, self._broken = None, True
            return
        if self._base is None:
            self._base = value
        self.since = value - self._base
