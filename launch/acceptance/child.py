"""A stage's process as the driver sees it: its limit, how it ended, and the end of what it left running."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from acceptance.here import ROOT
from acceptance.records import Status
from acceptance.stage import MARK, TERMINATED
from harness.basics.clock import utc_now

KILL_S = 20.0  # from SIGTERM to SIGKILL
SWEEP_S = 10.0  # the same, for what a stage has left running
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of what its descendants leave behind, so that it can be found and ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(own: Collection[int]) -> None:
    """Takes leave of adopted processes that have ended: whoever waits for their end sees a zombie as a process.

    Args:
        own: processes that are waited for elsewhere; one of them that has ended comes first, and ends this.
    """
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, 0)


class Child:
    """A stage while it runs.

    Args:
        log: gets what it prints, after what earlier attempts did.
    """

    def __init__(
        self, stage: str, command: list[str], environment: dict[str, str], log: Path, limit_s: float,
        kill_s: float = KILL_S,
    ) -> None:  # fmt: skip
        self.stage = stage
        self.limit_s = limit_s
        self.started_at = utc_now()
        self._kill_s = kill_s
        self._log = log
        self._asked: tuple[Status, str] | None = None
        self._kill_at = float("inf")
        self._started = time.monotonic()
        self._say(f"started at {self.started_at}, limit {limit_s:.0f} s")
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment | {MARK: stage}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Returns how long ago it was started."""
        return time.monotonic() - self._started

    def over(self) -> bool:
        """Whether it has ended, with all that it started; ends it at its limit. To be asked several times a second."""
        if self.process.poll() is not None:
            self._sweep()
            return True
        if self.seconds >= self.limit_s:
            self.end(Status.timeout, f"it was not done after {self.limit_s:.0f} s")
        if time.monotonic() >= self._kill_at:
            self._signal(signal.SIGKILL)
        return False

    def end(self, status: Status, reason: str) -> None:
        """Sends SIGTERM, once, and SIGKILL to its group some time later; the first reason counts."""
        if self._asked is None:
            self._asked = (status, reason)
            self._kill_at = time.monotonic() + self._kill_s
            self._say(f"SIGTERM: {reason}")
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def status(self, any_failed: bool, any_found: bool) -> tuple[Status, str]:
        """Returns how it went and why, once it is over."""
        code = self.process.returncode
        if self._asked is not None:
            return self._asked
        if code < 0 or code == TERMINATED:
            number = -code if code < 0 else code - 128
            perhaps = " (the machine was out of memory, perhaps)" if number == signal.SIGKILL else ""
            return Status.killed, f"died by {signal.Signals(number).name}{perhaps}"
        if code == os.EX_TEMPFAIL:
            return Status.timeout, "too little time was left for the rest"
        if code:
            return Status.failed, f"exit status {code}"
        if not any_found:
            return Status.failed, "it found out nothing"
        return (Status.failed if any_failed else Status.passed), ""

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _sweep(self) -> None:
        """Ends what the stage has left running, in groups of its own as well."""
        left = [one for one in psutil.Process().children(recursive=True) if self._marked(one)]
        if left:
            self._say(f"{len(left)} processes were left and are ended: {', '.join(map(str, left))}")
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.terminate()
        for one in psutil.wait_procs(left, timeout=SWEEP_S)[1]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        self._signal(signal.SIGKILL)

    def _marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.stage
        except (psutil.Error, OSError):
            return False

    def _say(self, line: str) -> None:
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(f"--- {self.stage}: {line}\n")
