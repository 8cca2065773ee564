"""Commands that a stage starts: several at a time, each within its time, and none left when the stage ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from acceptance.stage import Stage
from harness.basics.errors import REFUSED, one_line

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 12.0  # from SIGTERM to SIGKILL: the driver gives a whole stage 20 seconds
RESERVE_S = 3.0  # of the stage's own time, to write down what its last command came to
LOOK_S = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How a command ended that a stage started.

    Attributes:
        status: its exit status; negative, the signal that ended it.
        timed_out: whether it was ended because its time was over.
        stderr: what it wrote to standard error.
    """

    status: int
    seconds: float
    timed_out: bool
    stdout: str
    stderr: str

    @property
    def stderr_last(self) -> str:
        """Its last word: the last line on standard error that begins with ``error:``, or else the last of all."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return one_line((errors or lines or [""])[-1])

    @property
    def refused(self) -> bool:
        """Whether it was refused properly: one ``error:`` line, no traceback, and the exit status for that.

        A library may have warned of something before; refusals that precede all loading have nothing else.
        """
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return self.status == REFUSED and len(errors) == 1 and "Traceback (most recent" not in self.stderr

    @property
    def how(self) -> str:
        """How it ended, in one line, for a finding."""
        if self.timed_out:
            return f"not finished after {self.seconds:.0f} s; {self.stderr_last}".rstrip("; ")
        ended = f"signal {-self.status}" if self.status < 0 else f"exit {self.status}"
        return self.stderr_last.removeprefix("error: ") or ended


class Running:
    """A command that a stage has started. Whoever starts one sees to its end: :func:`together`, or ``wait``.

    Args:
        words: for Python.
        log: what it prints goes to ``LOG.log``, what it complains of to ``LOG.err``.
        timeout_s: seconds after which it is ended.
        env: further environment variables.
        before: records of earlier runs, among which this one's is not.
        shortened: whether ``timeout_s`` is all that the stage has left. If it does not do, nothing is found out: the
            stage ends with the status of one that is to go on at the next start.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        before: Iterable[Path] = (),
        shortened: bool = False,
    ) -> None:
        self.words, self.before, self.shortened = list(words), frozenset(before), shortened
        self.tick: Callable[[Running], None] | None = None  # called at every look, for who is to disturb it
        self._logs = log.with_name(log.name + ".log"), log.with_name(log.name + ".err")
        self._begun = time.monotonic()
        self._until = self._begun + timeout_s
        with open(self._logs[0], "wb") as out, open(self._logs[1], "wb") as err:
            # In the stage's process group, so that the end of that is this one's too.
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def poll(self) -> Ended | None:
        """Returns how it ended; None while it runs. Ends it when its time is over."""
        timed_out = self.process.poll() is None and time.monotonic() > self._until
        if timed_out:
            end([self])
            if self.shortened:
                print(f"no time left for {' '.join(self.words)}", flush=True)
                sys.exit(os.EX_TEMPFAIL)
        if self.process.poll() is None:
            if self.tick is not None:
                self.tick(self)
            return None
        stdout, stderr = (path.read_text(errors="replace") for path in self._logs)
        return Ended(self.process.returncode, time.monotonic() - self._begun, timed_out, stdout, stderr)

    def wait(self) -> Ended:
        """Waits for its end; whatever interrupts that ends it as well."""
        return together([_whole(self)], 1)[0]


def end(running: Sequence[Running]) -> None:
    """Asks commands to end, by SIGTERM, and kills all of them that is still there :data:`GRACE_S` later."""
    alive = [one for one in running if one.process.poll() is None]
    family = [member for one in alive for member in _family(one.process.pid)]
    for one in alive:
        one.process.terminate()
    until = time.monotonic() + GRACE_S
    for one in alive:
        try:
            one.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            family += _family(one.process.pid)
    for member in psutil.wait_procs(family, timeout=0.5)[1]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    for one in alive:
        one.process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


# What starts a command, is given how it ended, and may go on with another one.
Steps = Generator[Running, Ended, T]


def together(jobs: Iterable[Steps[T]], most: int) -> list[T]:
    """Runs jobs to their ends, ``most`` of them at a time; returns what they return.

    All is done by this one thread, so that SIGTERM, which raises SystemExit in it, ends all commands.
    """
    waiting, found = list(enumerate(jobs)), dict[int, T]()
    active: dict[int, tuple[Steps[T], Running]] = {}
    try:
        while waiting or active:
            for number, job in waiting[: most - len(active)]:
                waiting.pop(0)
                _advance(number, job, None, active, found)
            for number, (job, running) in list(active.items()):
                if (ended := running.poll()) is not None:
                    del active[number]
                    _advance(number, job, ended, active, found)
            time.sleep(LOOK_S)
    finally:
        end([running for _, running in active.values()])
    return [found[number] for number in sorted(found)]


def _advance(
    number: int, job: Steps[T], ended: Ended | None, active: dict[int, tuple[Steps[T], Running]], found: dict[int, T]
) -> None:
    try:
        active[number] = job, next(job) if ended is None else job.send(ended)
    except StopIteration as stop:
        found[number] = stop.value


def _whole(running: Running) -> Steps[Ended]:
    return (yield running)


def log_name(name: str) -> str:
    """Returns ``name`` as a file can be called."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")[:120]


def started(
    stage: Stage,
    name: str,
    words: Sequence[str],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    before: Iterable[Path] = (),
) -> Running:
    """Starts a command of a stage; see :func:`command_steps` and :class:`Running`."""
    left_s = stage.left_s() - RESERVE_S
    places = [str(ROOT), str(ROOT / "launch"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    ours = {"DS_ACCELERATOR": stage.device, "PYTHONPATH": os.pathsep.join(filter(None, places)), **(env or {})}
    return Running(words, stage.folder / log_name(name), min(timeout_s, left_s), ours, before, timeout_s > left_s)


def command_steps(
    stage: Stage, name: str, words: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> Steps[Ended]:
    """Runs Python with ``words`` to its end, or ends it; its log is in the stage's folder, named ``name``.

    Args:
        timeout_s: seconds; where the stage itself has less left, its end comes first, and it is to go on later.
        env: further environment variables.
    """
    return (yield started(stage, name, words, timeout_s, env))


def command(
    stage: Stage, name: str, words: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Does :func:`command_steps` at once."""
    return together([command_steps(stage, name, words, timeout_s, env)], 1)[0]
