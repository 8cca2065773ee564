"""CPU time that other processes took of the cores that a run is bound to.

The kernel counts what each core did, for whomever (``/proc/stat``, which shows the whole machine in a container too),
and what each process of ours took of it; the rest others had. It counts as theirs what a hypervisor gave to other
machines (steal), and not the handling of interrupts, which nobody can tell the owner of.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.machine import cgroups

TICKS = os.sysconf("SC_CLK_TCK")
MOST_THREADS = 256  # of ours that are looked at one by one, at some 10 us each
# A core's counts are samples, a process's are exact: so much may the one be below the other by chance.
TOLERANCE, TOLERANCE_S = 0.1, 0.5


class OthersMeter:
    """What others took, from the first :meth:`sample` with ``ends`` to the last one.

    Args:
        ranks: the run's on this host; what they start is the run's too.
        launchers: processes that are the run's without what else they have started.
        proc, mount: where the kernel shows processes and control groups.
    """

    def __init__(
        self,
        ranks: Sequence[psutil.Process],
        launchers: Sequence[psutil.Process] = (),
        proc: Path = cgroups.PROC,
        mount: Path = cgroups.MOUNT,
    ) -> None:
        self.cores = sorted({core for rank in ranks for core in _cores_of(rank)})
        self._ranks, self._launchers = list(ranks), list(launchers)
        self._proc, self._mount = proc, mount
        self._family: list[psutil.Process] = []
        self._of_rank: dict[int, float] = {}  # seconds, when last seen: a rank may end before the last look
        self._ends: list[_Counts] = []  # the first and the last
        self._threads: dict[int, tuple[float, int]] | None = {}  # seconds and core of each thread, when last looked at
        self._own = dict.fromkeys(self.cores, 0.0)  # by core, as far as it was seen

    def sample(self, time_s: float, ends: bool) -> None:
        """Looks where our threads run, and ``ends`` says that this may be the last time: then at all counts too.

        Args:
            time_s: on the run's clock.
        """
        for rank in self._ranks:
            with contextlib.suppress(psutil.Error):
                self._of_rank[rank.pid] = _seconds(rank)
        if ends:
            self._family = _family(self._ranks)
            counts = _Counts(time_s, self._cores_did(), self._own_seconds(), self._throttled())
            self._ends[1:] = [counts]
        self._look_at_threads()

    def _cores_did(self) -> dict[int, tuple[float, float]]:
        """Returns, by core, the seconds that it worked or was not ours to work, and of these the stolen ones."""
        found: dict[int, tuple[float, float]] = {}
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (self._proc / "stat").read_text(encoding="ascii").splitlines():
                name, *cells = line.split()
                if not name.startswith("cpu"):
                    break
                if name != "cpu" and int(name[3:]) in self._own:
                    user, nice, system, stolen = (int(cells[place]) / TICKS for place in (0, 1, 2, 7))
                    found[int(name[3:])] = (user + nice + system + stolen, stolen)
        return found

    def _own_seconds(self) -> float:
        """Returns the CPU time of the run's processes, ranks that have ended and what was waited for included."""
        total = sum(self._of_rank.values())
        for process in self._family:
            if process.pid in self._of_rank:
                continue
            with contextlib.suppress(psutil.Error):
                total += _seconds(process)
        for process in self._launchers:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _throttled(self) -> float | None:
        return cgroups.throttled_s(cgroups.membership(self._proc), self._mount)

    def _look_at_threads(self) -> None:
        """Gives what each thread took since the last look to the core that it is on now."""
        if self._threads is None:
            return
        seen: dict[int, tuple[float, int]] = {}
        for process in (*self._family, *self._launchers):
            with contextlib.suppress(OSError):
                for task in os.scandir(self._proc / str(process.pid) / "task"):
                    with contextlib.suppress(OSError, ValueError, IndexError):
                        cells = Path(task.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
                        seen[int(task.name)] = ((int(cells[11]) + int(cells[12])) / TICKS, int(cells[36]))
            if len(seen) > MOST_THREADS:
                self._threads = None
                return
        known, first = self._threads, not self._threads
        self._threads = seen
        for thread, (seconds, core) in () if first else seen.items():
            if core in self._own:
                self._own[core] += seconds - known.get(thread, (0.0, 0))[0]

    def summary(self) -> dict[str, Any]:
        """Returns what was seen, ready for JSON; see ``results/README.md``. Shares and seconds are None if unknown."""
        found: dict[str, Any] = {
            "share": None,
            "others_s": None,
            "stolen_s": None,
            "throttled_s": None,
            "seconds": None,
            "cores": [],
        }
        if len(self._ends) < 2:
            return found
        begin, end = self._ends
        seconds = end.time_s - begin.time_s
        if end.throttled_s is not None and begin.throttled_s is not None:
            found["throttled_s"] = end.throttled_s - begin.throttled_s
        if seconds <= 0 or not self.cores or not set(self.cores) <= begin.cores.keys() & end.cores.keys():
            return found
        did = {core: [end.cores[core][place] - begin.cores[core][place] for place in (0, 1)] for core in self.cores}
        busy, own = sum(one for one, _ in did.values()), end.own_s - begin.own_s
        if own > busy * (1 + TOLERANCE) + TOLERANCE_S:
            return found  # what is shown of the cores leaves out our own work
        others = max(busy - own, 0.0)
        by_core = [
            {
                "core": core,
                "busy_share": _share(one, seconds),
                "others_share": None if self._threads is None else _share(one - self._own[core], seconds),
            }
            for core, (one, _) in did.items()
        ]
        return found | {
            "share": _share(others, seconds * len(self.cores)),
            "others_s": others,
            "stolen_s": sum(stolen for _, stolen in did.values()),
            "seconds": seconds,
            "cores": by_core,
        }


class _Counts:
    """All counts at one moment."""

    def __init__(
        self, time_s: float, cores: dict[int, tuple[float, float]], own_s: float, throttled_s: float | None
    ) -> None:
        self.time_s, self.cores, self.own_s, self.throttled_s = time_s, cores, own_s, throttled_s


def _seconds(process: psutil.Process) -> float:
    """Returns the CPU time of a process and of those that it has waited for."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _share(part: float, whole: float) -> float:
    return round(min(max(part / whole, 0.0), 1.0), 4)


def _cores_of(process: psutil.Process) -> Iterable[int]:
    try:
        return os.sched_getaffinity(process.pid)
    except (OSError, AttributeError):
        return ()


def _family(ranks: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Returns the ranks that are alive and all that they have started, each once."""
    found: dict[int, psutil.Process] = {}
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            found |= {process.pid: process for process in (rank, *rank.children(recursive=True))}
    return list(found.values())
