"""Who may write a run: two locks in its directory, which the kernel takes back from a process that dies.

``run.lock`` is held by the one process that writes, rank 0 as a rule. Our launcher begins a run, or a new segment of
it, seconds before rank 0 is there to write: it holds ``launch.lock`` from then to the launch's end, and whoever wants
to resume a run must have both.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import filelock

from harness.basics.errors import UserError
from harness.basics.files import cannot_write

LOCK = "run.lock"
LAUNCH_LOCK = "launch.lock"
LOCK_TIMEOUT_S = 20.0  # for a run that has been ended and is still writing down how


class RunLock:
    """This process's hold on a run.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = {name: filelock.FileLock(directory / name) for name in (LAUNCH_LOCK, LOCK)}

    def hold(self, *names: str, pid: int | None = None) -> None:
        """Takes :data:`LOCK`, :data:`LAUNCH_LOCK` or both, until this process ends or calls :meth:`release`.

        Args:
            pid: who has the run if nothing else says so.

        Raises:
            UserError: another process has the run, and does not end within :data:`LOCK_TIMEOUT_S`.
        """
        for name in names:
            try:
                self._locks[name].acquire(timeout=LOCK_TIMEOUT_S)
            except filelock.Timeout as error:
                pid = holder(self._directory / LOCK) or holder(self._directory / LAUNCH_LOCK) or pid
                self.release()
                found = f"{self._directory.name} is still being run" + (f" (process {pid})" if pid else "")
                raise UserError("resume", found, "wait for it, or end it first") from error
            except (OSError, NotImplementedError) as error:
                if not isinstance(error, NotImplementedError) and error.errno not in (errno.ENOSYS, errno.ENOLCK):
                    self.release()
                    raise cannot_write(self._directory / name, error) from error
                # A file system without locks: nobody can be kept out.

    def release(self, *names: str) -> None:
        """Gives back what is held, or only ``names`` of it."""
        for name in names or self._locks:
            self._locks[name].release()


def holder(path: Path) -> int | None:
    """Returns the process that has locked a file, as the kernel tells it; None where it does not."""
    try:
        inode = os.stat(path).st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:  # "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"; with "->" after the number, one that waits
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK" or words[5].rpartition(":")[2] != str(inode):
            continue
        if _has_open(int(words[4]), path):  # inode numbers are a file system's own
            return int(words[4])
    return None


def _has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):  # another user's process, or one that has just ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed by now
                if os.path.samefile(entry, path):
                    return True
    return False
