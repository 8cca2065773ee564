"""The engine itself, which only a rank imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator

from harness.basics.clock import Clock
from harness.engines.simulate.engine import SimulateEngine
from harness.workload.records import Completion, Request


class OddEngine(SimulateEngine):
    """Dies with seeds 3 and 6, and with 9 hangs."""

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields what the simulation does, if it comes to that."""
        if not os.path.exists(os.environ["ODD_MENDED"]):
            if "dataset.seed=3" in sys.argv:
                os.abort()
            if "dataset.seed=6" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)
            if "dataset.seed=9" in sys.argv:
                ctypes.PyDLL(None).sleep(3600)  # with the interpreter's lock: no thread and no handler runs
        yield from super().generate(requests, clock)
