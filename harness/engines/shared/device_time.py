"""How long the device had passes to compute, by its own clock: CUDA events around what each of them launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


@dataclass(frozen=True, slots=True)
class Busy:
    """Seconds of the passes that were measured.

    Attributes:
        busy_s: from each pass's first launch to its last kernel's end; kernels that wait for the host to launch them
            are within.
        gap_s: from the end of a pass to the beginning of the next, all together.
        passes: how many there were.
    """

    busy_s: float
    gap_s: float
    passes: int


class DeviceTime:
    """Measures passes on a CUDA device; on another it does nothing. Nothing here waits for the device but :meth:`end`.

    Args:
        make: makes an event.
    """

    def __init__(self, device: torch.device, make: Callable[[], Event] | None = None) -> None:
        if make is None and device.type == "cuda":
            make = _timed
        self._make = make
        self._open: deque[tuple[Event, Event]] = deque()  # not read yet, the oldest first
        self.begin()

    def begin(self) -> None:
        """Forgets what was measured."""
        self._open.clear()
        self._last: Event | None = None  # the end of the pass that was read last
        self._busy_ms = self._gap_ms = 0.0
        self._passes = 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Measures what is launched inside on the current stream: one pass."""
        if self._make is None:
            yield
            return
        first, last = self._make(), self._make()
        first.record()
        yield
        last.record()
        self._open.append((first, last))
        while self._open and self._open[0][1].query():
            self._read()

    def end(self) -> Busy | None:
        """Returns what the passes since :meth:`begin` took; None where nothing is measured."""
        if self._make is None:
            return None
        while self._open:
            self._open[0][1].synchronize()
            self._read()
        return Busy(self._busy_ms / 1e3, self._gap_ms / 1e3, self._passes)

    def _read(self) -> None:
        first, last = self._open.popleft()
        self._busy_ms += first.elapsed_time(last)
        if self._last is not None:
            self._gap_ms += self._last.elapsed_time(first)
        self._last = last
        self._passes += 1


def _timed() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, no-any-return]
