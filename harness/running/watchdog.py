"""Closes the record of a run whose rank 0 was killed, where no launcher of ours is there to do it.

Under a bare ``deepspeed``, and where a run has one rank alone, nobody but rank 0 knows of the record. So rank 0 starts
this as a program, which detaches itself, waits for rank 0's end at the other end of a pipe, and ends silently if
the record is closed then. Meanwhile it is the witness of rank 0's life, and continues ranks that are stopped when
they are to end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.running.watch import Sleepers

ZOMBIE_S = 2.0  # for a process whose files are closed to be dead
# linux/pidfd.h: _IOWR(0xFF, 11, struct pidfd_info) for its first 64 bytes, whose last four are the wait status.
PIDFD_INFO_SIZE, PIDFD_INFO_EXIT, PIDFD_EXIT_AT = 64, 1 << 3, 60
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11


def watch(results_dir: str | Path, run_id: str, timeout_s: float | None = None) -> Callable[[], None]:
    """Starts the program for this process's run; does without where no process can be started.

    Returns:
        What to call once this process has told the user itself how the run ended, but could not write it down: the
        program tries once more, silently.
    """
    import subprocess

    reader, writer = os.pipe()  # the writing end is closed by this process's end, however it comes

    def forked() -> None:
        with contextlib.suppress(OSError):
            os.close(writer)

    os.register_at_fork(after_in_child=forked)
    words = [sys.executable, __file__, str(results_dir), run_id, str(os.getpid())]
    words += [] if timeout_s is None else [str(timeout_s)]
    with contextlib.suppress(OSError):
        subprocess.Popen(words, stdin=reader, stdout=subprocess.DEVNULL).wait()  # it has detached itself by then
    os.close(reader)

    def told() -> None:
        with contextlib.suppress(OSError):
            os.write(writer, b"told")

    return told


def close(results_dir: str, run_id: str, pid: int, timeout_s: float | None = None) -> None:
    """Waits for the end of the other end of standard input, then closes the record if ``pid`` has left it open."""
    from harness.machine.memory import OomKills
    from harness.running.faults import killed, timed_out, way_on

    kills = OomKills()
    number, sleepers, told = _outlive(Path(results_dir, run_id), pid, timeout_s)

    import socket

    from harness.basics.errors import UserError, complain
    from harness.basics.outcome import RUNNING
    from harness.results.closing import close_unfinished
    from harness.results.directory import read_record, run_directory

    # A run that is resumed takes the directory over, under a lock: the place to try that lock is here.
    record = read_record(results_dir, run_id)
    if record is None or record["status"] != RUNNING:
        return
    if (record.get("pid"), record.get("hostname")) != (pid, socket.gethostname()):
        return
    fault = killed("rank 0", number, kills, record.get("config") or {}, record)
    if sleepers.killed and timeout_s is not None:
        fault = timed_out(timeout_s)
    line = f"{fault.error} ({way_on(run_directory(results_dir, run_id), run_id)})"
    try:
        owner = {name: record[name] for name in ("pid", "hostname")}
        if close_unfinished(results_dir, run_id, fault.status, fault.error, **owner) is None:
            return
    except UserError as error:
        line = f"{fault.error}; and the record cannot be written: {error}"
    if not told:
        with contextlib.suppress(OSError):  # the reader may have left
            complain(line)


def _outlive(directory: Path, pid: int, timeout_s: float | None) -> tuple[int, Sleepers, bool]:
    """Looks after rank 0 until its end of standard input is closed, which its death does.

    Returns:
        The signal that ended it; what was woken; and whether it has told the user how the run ended.
    """
    import psutil

    from harness.results.lifeline import Witness
    from harness.running.watch import DEAF_S, GRACE_S, LOOK_S, STOPPED_S, Sleepers, send

    witness, sleepers, ending = Witness(directory), Sleepers(), Ending(pid)
    due = None if timeout_s is None else time.monotonic() + timeout_s + STOPPED_S
    rank, launcher, port = None, None, None
    with contextlib.suppress(psutil.Error):
        rank = psutil.Process(pid)
        port = rank.environ().get("MASTER_PORT")  # none where a user's shell has started it, whose others are not ours
        launcher = None if port is None else rank.parent()

    def wake() -> None:
        if rank is not None:
            sleepers.wake([rank])
        for child in [] if launcher is None else launcher.children():
            with contextlib.suppress(psutil.Error):
                if child != rank and "LOCAL_RANK" in (words := child.environ()) and words.get("MASTER_PORT") == port:
                    sleepers.wake([child])

    told = False
    while True:
        if select.select([0], [], [], LOOK_S)[0]:
            if not os.read(0, 4096):
                break
            told = True
        witness.look()
        if due is not None and time.monotonic() > due:
            with contextlib.suppress(psutil.Error):
                wake()
            # One that hangs outside Python does not heed its own alarm, and no launcher ends it.
            if launcher is None and rank is not None and time.monotonic() > due + GRACE_S + DEAF_S:
                sleepers.killed = True
                send(rank, signal.SIGKILL)
    witness.gone_now()
    number = ending.signal()  # before the launcher reaps it
    with contextlib.suppress(psutil.Error):
        wake()  # the others, for which the launcher would wait
    return number, sleepers, told


class Ending:
    """How another process's child ends. A shell reaps it at once; a handle taken before still says how (Linux 6.15)."""

    def __init__(self, pid: int) -> None:
        self._pid, self._handle = pid, -1
        with contextlib.suppress(OSError, AttributeError):
            self._handle = os.pidfd_open(pid)

    def signal(self) -> int:
        """Returns the signal that has ended the process, or is about to; 0 where that is not known any more."""
        deadline = time.monotonic() + ZOMBIE_S
        while time.monotonic() < deadline:
            try:
                text = Path(f"/proc/{self._pid}/stat").read_text()
            except OSError:
                return self._afterwards() or 0
            # The name before the last bracket may hold anything; then fields 3 to 52 of proc(5).
            values = text.rpartition(")")[2].split()
            if values[0] in "ZX":
                return int(values[49]) & 0x7F if len(values) > 49 else 0
            time.sleep(0.01)
        return 0

    @property
    def known_afterwards(self) -> bool:
        """Whether the kernel still says how the process ended, which is gone."""
        return self._afterwards() is not None

    def _afterwards(self) -> int | None:
        """Returns the signal of a process that is gone, from the handle; None where the kernel does not tell."""
        import fcntl

        answer = bytearray(PIDFD_INFO_SIZE)
        struct.pack_into("=Q", answer, 0, PIDFD_INFO_EXIT)
        try:
            fcntl.ioctl(self._handle, PIDFD_GET_INFO, answer)
        except (OSError, ValueError):  # an older kernel, or no handle
            return None
        (mask,), (status,) = struct.unpack_from("=Q", answer, 0), struct.unpack_from("=i", answer, PIDFD_EXIT_AT)
        return status & 0x7F if mask & PIDFD_INFO_EXIT else None


if __name__ == "__main__":
    # Away from rank 0's family, which a launcher ends as a whole, and from the terminal's signals.
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a job system signals all that it has started
        signal.signal(number, signal.SIG_IGN)
    # Our modules would shadow installed packages.
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [] if (root / "harness" / "conf").is_dir() else [str(root)]
    close(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else None)
