"""Locks of torch's extension builder: a file ``lock`` in an extension's folder, there until the build has ended.

A build that is killed leaves it behind, and the next one waits for it for ever (torch/utils/file_baton.py). The builder
keeps the file open meanwhile, so that a lock which no process has open is nobody's, unless the folder is another
host's as well: then its build goes on writing there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

LOCK = "lock"
OWNER = "harness-host"  # the host that last built here
QUIET_S = 600.0  # without a file written, before the lock of another host's build counts as left behind
LOOK_S = 0.5


def held(lock: Path) -> bool:
    """Whether a process of this host has the file open, as far as this user may see."""
    try:
        mine = lock.stat()
    except OSError:
        return False
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            for entry in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    found = os.stat(entry.path)
                    if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
                        return True
    return False


def stale(folder: Path) -> bool:
    """Whether the folder has a lock of a build that has ended without taking it away."""
    lock = folder / LOCK
    if not lock.exists() or held(lock):
        return False
    with contextlib.suppress(OSError):
        if (folder / OWNER).read_text() == socket.gethostname():
            return True
    return time.time() - _written_at(folder) > QUIET_S


def clear(folder: Path) -> bool:
    """Takes such a lock away; returns whether there was one. Safe to call from several processes."""
    if not stale(folder):
        return False
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)  # or what another process has just made anew would be taken away
        if not stale(folder):
            return False
        (folder / LOCK).unlink(missing_ok=True)
        return True
    finally:
        os.close(place)


def wait(folder: Path, say: Callable[[str], None]) -> None:
    """Returns once nobody builds in the folder; takes away a lock that was left behind."""
    told = False
    while (folder / LOCK).exists():
        if clear(folder):
            say(f"{folder.name}: a lock that a build had left behind is gone")
            return
        if not told:
            say(f"{folder.name}: another process builds it, waiting ({folder / LOCK})")
            told = True
        time.sleep(LOOK_S)


def own(folder: Path) -> None:
    """Notes that builds of the folder are this host's from now on."""
    with contextlib.suppress(OSError):
        (folder / OWNER).write_text(socket.gethostname())


def _written_at(folder: Path) -> float:
    """Returns when a file of the folder was last written, seconds since the epoch; now if nobody can tell."""
    times = []
    with contextlib.suppress(OSError):
        times = [entry.stat().st_mtime for entry in os.scandir(folder)]
    return max(times, default=time.time())
