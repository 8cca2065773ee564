"""Watches a launch to its end, or ends it: so that every rank has its say, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from harness.machine import memory, slurm
from harness.ranks import signals
from harness.results.lifeline import Witness

MAIN = Path(__file__).resolve().parents[1] / "main.py"
PROGRAMS = (MAIN, MAIN.parent / "accuracy" / "__main__.py")  # whose processes are ranks
LOOK_S = 0.2
GRACE_S = 30.0  # for ranks to write down what they have, after they were asked to end
DEAF_S = 5.0  # the same, for ranks that have not heeded their own alarm for as long already
STOPPED_S = 1.0  # after its time is over, for a rank that is stopped to be continued by whoever stopped it
AGAIN_S = 2.0  # for a rank that we continue to stay so


@dataclass(frozen=True, slots=True)
class Watched:
    """How a launch ended, as far as its outside shows."""

    returncode: int
    timed_out: bool
    interrupted: bool
    timeout_s: float | None
    kills: memory.OomKills


class Sleepers:
    """Ranks that are stopped (SIGSTOP) when they are to end: continued, so that they say how; or else killed."""

    def __init__(self) -> None:
        self.killed = False
        self._woken: dict[psutil.Process, float] = {}

    def wake(self, ranks: list[psutil.Process]) -> None:
        """Continues those that are stopped, and kills those that do not stay continued; call it several times."""
        for rank in ranks:
            if _status(rank) != psutil.STATUS_STOPPED:
                continue
            now = time.monotonic()
            if now - self._woken.setdefault(rank, now) < AGAIN_S:
                send(rank, signal.SIGCONT)
            else:
                self.killed = True
                send(rank, signal.SIGKILL)


def watch(
    arguments: list[str],
    variables: dict[str, str],
    timeout_s: float | None,
    output: IO[bytes] | None = None,
    tick: Callable[[], None] | None = None,
    directory: Path | None = None,
) -> Watched:
    """Runs a launch to its end, or ends it; its ranks get SIGINT first, so that they write their record.

    Args:
        arguments, variables: the command and its environment.
        timeout_s: the ranks keep the time themselves; we step in when one cannot.
        output: where it prints; None for the terminal.
        tick: called several times a second.
        directory: the run's, whose rank 0 is then witnessed.
    """
    stop_asked: list[int] = []
    kills = memory.OomKills()
    witness, sleepers = None if directory is None else Witness(directory), Sleepers()

    def ask(signum: int, frame: FrameType | None) -> None:
        stop_asked.append(signum)

    def look() -> None:
        if witness is not None:
            witness.look()
        if (due is not None and time.monotonic() > due) or (witness is not None and witness.gone):
            sleepers.wake([member for member in whole(process.pid) if is_rank(member)])

    with _handling(ask):
        # A session of its own: Ctrl-C reaches the ranks through us alone, once.
        process = subprocess.Popen(
            arguments,
            env=variables,
            start_new_session=True,
            stdin=None if output is None else subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
        due = None if timeout_s is None else time.monotonic() + timeout_s + STOPPED_S
        # One that hangs outside Python does not heed its own alarm.
        deadline = None if timeout_s is None else time.monotonic() + timeout_s + GRACE_S
        timed_out = False
        while process.poll() is None and not timed_out and not stop_asked:
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                timed_out = deadline is not None and time.monotonic() > deadline
                look()
                if tick is not None:
                    tick()
        if process.poll() is None:
            _end(process, _passed_on(stop_asked), DEAF_S if timed_out else GRACE_S, witness, sleepers)
        _end_strays(process.pid)
        if witness is not None:
            witness.look()
        if sleepers.killed and not stop_asked:
            timed_out = timed_out or (due is not None and time.monotonic() > due)
    return Watched(process.returncode, timed_out, bool(stop_asked), timeout_s, kills)


def _passed_on(asked: list[int]) -> int:
    """Returns what the ranks are sent: that a job system pauses the run, or else what a Ctrl-C is."""
    paused = asked and (asked[0] == signals.PAUSE or (asked[0] == signal.SIGTERM and slurm.current() is not None))
    return asked[0] if paused else signal.SIGINT


def _end(
    process: subprocess.Popen[bytes], signum: int, grace_s: float, witness: Witness | None, sleepers: Sleepers
) -> None:
    """Signals the ranks, gives them time, then kills whatever is left of the launch."""
    members = tree(process.pid)
    ranks = [member for member in whole(process.pid) if is_rank(member)]
    for rank in ranks:
        send(rank, signum)
    if not ranks:
        send(psutil.Process(process.pid), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while process.poll() is None and time.monotonic() < deadline:
        sleepers.wake(ranks)
        if witness is not None:
            witness.look()
        try:
            process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            continue
    _, left = psutil.wait_procs(tree(process.pid) + members, timeout=0.5)
    for member in left:
        send(member, signal.SIGKILL)
    try:
        process.wait(AGAIN_S)  # a launcher ends by itself when its ranks have
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_strays(session: int) -> None:
    """Ends ranks that have outlived their launch, since the next one would share the machine with them."""
    strays = [process for process in psutil.process_iter() if _session_of(process) == session and is_rank(process)]
    for rank in strays:
        send(rank, signal.SIGINT)
        send(rank, signal.SIGCONT)  # one that is stopped would not hear it
    for rank in psutil.wait_procs(strays, GRACE_S)[1]:
        send(rank, signal.SIGKILL)


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def tree(pid: int) -> list[psutil.Process]:
    """Returns all that a process has started, and those again."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def whole(pid: int) -> list[psutil.Process]:
    """Returns a process and all of its :func:`tree`."""
    try:
        return [psutil.Process(pid), *tree(pid)]
    except psutil.NoSuchProcess:
        return []


def is_rank(process: psutil.Process) -> bool:
    """Returns whether a process is a rank of ours, not a launcher."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    return any(str(program) in arguments for program in PROGRAMS) and "deepspeed.launcher.launch" not in arguments


def send(process: psutil.Process, signum: int) -> None:
    """Signals a process that may have ended."""
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        pass


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.Error:
        return str(psutil.STATUS_DEAD)


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM, signals.PAUSE]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
        numbers.append(signal.SIGHUP)  # the ranks have no terminal that could be closed
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
