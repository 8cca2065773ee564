"""How a rank is told to end: signals, the end of its time, and the death of whoever started the launch."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from harness.ranks.rank import PARENT_VARIABLE

ORPHANED = signal.SIGRTMIN  # sent by a rank to itself; of those that wait, Python handles the lowest number first
PAUSE = signal.SIGUSR1  # from a job system that wants the machine back, or whose time is nearly over
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, PAUSE, ORPHANED)
PATIENCE_S = 15.0  # for the main thread to come back from a library and notice a signal


class Ended(BaseException):
    """A signal asked the run to end: SIGALRM, since its time is over, :data:`ORPHANED`, since its launcher is gone.

    No Exception, so that no library swallows it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def handled(timeout_s: float | None, hung: Callable[[int], None], patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Turns :data:`ENDING`, the end of ``timeout_s`` among them, into :class:`Ended`, raised in the main thread.

    Once only: what follows the first is not interrupted by the second, since the launcher sends several.

    Args:
        hung: called with the signal, in another thread, when the main thread does not notice it in time:
            a collective whose other ranks are gone may never return.
    """
    noticed = threading.Event()

    def nothing(signum: int, frame: FrameType | None) -> None:
        pass

    def quiet() -> None:
        for number in ENDING:  # SIG_IGN would have the interpreter complain of a signal that is already on its way
            signal.signal(number, nothing)

    def end(signum: int, frame: FrameType | None) -> None:
        noticed.set()
        quiet()
        raise Ended(signum)

    def watch() -> None:
        # The interpreter writes a signal's number here at once, whatever the main thread is doing.
        for number in iter(lambda: os.read(reader, 1), b""):
            if number[0] in ENDING and not noticed.wait(patience_s):
                hung(number[0])

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in ENDING:  # also where a shell started us in the background with SIGINT ignored
        signal.signal(number, end)
    if timeout_s is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        noticed.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        quiet()  # writing down how the run ended is not interrupted either
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def end_with_the_parent() -> None:
    """Ends this rank when a process that started the launch is gone: nobody would wait for it any more."""

    def watch() -> None:
        _wait_for_an_end(parents)
        os.kill(os.getpid(), ORPHANED)

    try:
        parents = _launchers()
    except psutil.NoSuchProcess:  # gone already
        os.kill(os.getpid(), ORPHANED)
        return
    if parents:
        threading.Thread(target=watch, daemon=True).start()


def _wait_for_an_end(processes: list[psutil.Process]) -> None:
    """Returns once one of the processes is gone: at once where the kernel tells of it, else within a second."""
    handles: list[int] = []
    with suppress(OSError, AttributeError):
        handles = [os.pidfd_open(process.pid) for process in processes]
    while all(map(_alive, processes)):
        if handles:
            select.select(handles, [], [], 1.0)
        else:
            time.sleep(1.0)


def _launchers() -> list[psutil.Process]:
    """Returns our launcher, which sees to DeepSpeed's by itself; without it DeepSpeed's two, as far as on this host."""
    ours = os.environ.get(PARENT_VARIABLE)
    if ours is not None:
        return [psutil.Process(int(ours))] if int(ours) != os.getpid() else []
    parents = psutil.Process().parents()[:2]
    return [parent for parent in parents if any("deepspeed" in Path(word).name for word in parent.cmdline()[:5])]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
