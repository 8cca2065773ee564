"""What other processes see of a run: the zero of its clock on the host's clock, how long rank 0 lived, when it died.

Rank 0 cannot write down its own death, nor that it was stopped (SIGSTOP). So it notes in ``run.clock`` where its clock
began on the host's, which all processes of a boot share; and whoever started it, or the watchdog, writes beside
that once a second that its process exists, and in the end when it was gone. A run that stops its clock itself has no
need of the file, and it is taken away. Nothing here is flushed to the disk: after a power cut it would mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

NAME = "run.clock"
SEEN_S = 1.0  # from one sign that rank 0's process exists to the next
SEEN, GONE = "seen", "gone"  # of one length, so that one can be written over the other on a full disk


@dataclass(frozen=True, slots=True)
class Life:
    """What ``run.clock`` says; seconds are of the run's clock.

    Attributes:
        boot: see :func:`boot`.
        pid: rank 0's process.
        segment: the number of the segment, from 0.
        zero_s: where the clock's zero lies on the host's clock.
        until_s: when rank 0 was last seen, or was seen to be dead.
        gone: whether that was its death.
    """

    boot: str | None
    pid: int
    segment: int
    zero_s: float
    until_s: float
    gone: bool


def host_s() -> float:
    """Returns the seconds since the host was booted, which all its processes agree on."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot() -> str | None:
    """Returns what is equal for all processes for which :func:`host_s` is the same clock; None where nothing tells."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):  # a kernel without time namespaces: one clock for all
        name += " " + os.readlink("/proc/self/ns/time")
    return name


def begun(directory: Path, segment: int, clock_s: float) -> None:
    """Notes that this process is rank 0 and its clock is at ``clock_s``; without a shared clock nothing."""
    if (name := boot()) is None:
        return
    line = json.dumps({"boot": name, "pid": os.getpid(), "segment": segment, "zero_s": host_s() - clock_s})
    with contextlib.suppress(OSError):  # a disk that is full has an error line of its own
        (directory / NAME).write_bytes(line.encode() + b"\n" + _moment(SEEN))


def _moment(word: str) -> bytes:
    return f"{word} {host_s():020.6f}\n".encode()


def read(directory: Path) -> Life | None:
    """Returns what ``run.clock`` says; None where there is none, or it is torn."""
    try:
        first, moment = (directory / NAME).read_bytes().decode().split("\n")[:2]
        noted = json.loads(first)
        word, at = moment.split(" ")
        zero_s = float(noted["zero_s"])
        return Life(
            noted["boot"], int(noted["pid"]), int(noted["segment"]), zero_s, float(at) - zero_s, gone=word == GONE
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(directory: Path) -> None:
    """Takes ``run.clock`` away, once the record has what it says."""
    with contextlib.suppress(OSError):
        (directory / NAME).unlink()


class Witness:
    """Sees that rank 0's process exists, and when it does no more; for a process that outlives it.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: Path) -> None:
        self.gone = False
        self._path = directory / NAME
        self._rank: psutil.Process | None = None
        self._due = 0.0

    def gone_now(self) -> None:
        """Writes down that rank 0 is dead, for one who knows without looking: a process lingers after its end."""
        if not self.gone:
            self._write(GONE)

    def look(self) -> None:
        """Writes down what there is to be seen; cheap, to be called several times a second."""
        if self.gone:
            return
        if self._rank is None:
            if (life := read(self._path.parent)) is None:
                return  # its clock has not begun
            try:
                self._rank = psutil.Process(life.pid)
            except psutil.Error:
                self._write(GONE)
                return
        if not alive(self._rank):
            self._write(GONE)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + SEEN_S
            self._write(SEEN)

    def _write(self, word: str) -> None:
        self.gone = word == GONE
        # Never made again: a run that has stopped its clock has taken it away.
        with contextlib.suppress(OSError), open(self._path, "r+b") as file:
            file.readline()
            place = file.tell()
            if not file.readline().startswith(GONE.encode()):
                file.seek(place)
                file.write(_moment(word))


def alive(process: psutil.Process) -> bool:
    """Returns whether a process exists that is more than a zombie."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
