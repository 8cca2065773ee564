"""How much memory there is, how much was taken, and whom the kernel killed for want of it."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from harness.basics.errors import UserError

# As libraries put it: PyTorch, cuBLAS, cuDNN, NCCL, the C library and DeepSpeed.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "insufficient memory",
    "not enough memory",
    "std::bad_alloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cudaerrormemoryallocation",
    "failed to cuda calloc",
)


def available_memory_bytes() -> int:
    """Returns the host memory (bytes) that can still be taken, container limits included."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError):
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        headroom = cgroup_headroom(membership, Path("/sys/fs/cgroup"))
        if headroom is not None:
            available = min(available, headroom)
    return available


def cgroup_headroom(membership: str, mount: Path) -> int | None:
    """Returns the bytes left under the tightest memory limit of this process's control groups.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mount: where the control groups are mounted, ``/sys/fs/cgroup``.

    Returns:
        Limit less usage, the reclaimable file cache not counted as usage; None when no limit is in force.
    """
    tightest: int | None = None
    for line in membership.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            root, limits = mount, ["memory.max", "memory.high"]
            usage, cache = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limits = mount / "memory", ["memory.limit_in_bytes"]
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container often sees its own group mounted as the root, and not the path it has on the host.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for depth in range(len(parts), -1, -1):
            group = root.joinpath(*parts[:depth])
            bounds = [bound for name in limits if (bound := _read_int(group / name)) is not None]
            used = _read_int(group / usage)
            # Version 1 writes "no limit" as the largest page-aligned signed 64-bit number.
            if not bounds or used is None or min(bounds) >= 2**62:
                continue
            left = max(0, min(bounds) - max(0, used - _stat_value(group / "memory.stat", cache)))
            tightest = left if tightest is None else min(tightest, left)
    return tightest


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: "max"
        return None


def _stat_value(path: Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def peak_memory_bytes(device: str) -> int:
    """Returns the most memory (bytes) this process has held.

    On the host that is resident memory; on ``"cuda"`` or ``"cuda:N"`` what torch allocated on the device, 0 when
    torch is not loaded.
    """
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")
        return int(torch.cuda.max_memory_allocated(device)) if torch is not None else 0
    # On Linux ru_maxrss starts at the size of the process that launched this one, VmHWM does not.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: str) -> None:
    """Has :func:`peak_memory_bytes` begin anew with what is held now, as far as the system allows it."""
    if device.startswith("cuda"):
        if (torch := sys.modules.get("torch")) is not None:
            torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): resets VmHWM


class OomKills:
    """Whether the kernel has ended a process for want of memory since this was made.

    Counted for our control group where it counts them (its ``memory.events``; ``memory.oom_control`` in version
    1), else for the machine (``/proc/vmstat``), where another's process may be meant.

    Args:
        proc, cgroups: where the kernel shows processes and control groups.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc, self._cgroups = proc, cgroups
        self._before = self._read()

    @property
    def known(self) -> bool:
        """Whether there is such a count at all."""
        return self._before is not None

    def __bool__(self) -> bool:
        now = self._read()
        return self._before is not None and now is not None and now[0] == self._before[0] and now[1] > self._before[1]

    def _read(self) -> tuple[Path, int] | None:
        for path in self._places():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except OSError:
                continue
            for line in lines:
                name, _, value = line.partition(" ")
                if name == "oom_kill" and value.isdecimal():
                    return path, int(value)
        return None

    def _places(self) -> Iterator[Path]:
        try:
            membership = (self._proc / "self" / "cgroup").read_text(encoding="utf-8")
        except OSError:
            membership = ""
        for line in membership.splitlines():
            hierarchy, _, rest = line.partition(":")
            controllers, _, place = rest.partition(":")
            if hierarchy == "0" and not controllers:
                root, name = self._cgroups, "memory.events"
            elif "memory" in controllers.split(","):
                root, name = self._cgroups / "memory", "memory.oom_control"
            else:
                continue
            # A container often sees its own group mounted as the root, and not the path it has on the host.
            parts = [part for part in place.split("/") if part]
            for group in (root.joinpath(*parts) if ".." not in parts else root, root):
                if (group / name).is_file():
                    yield group / name
                    break
        yield self._proc / "vmstat"


def out_of_memory(error: BaseException) -> BaseException | None:
    """Returns what of an exception and its causes says that memory ran out; None when nothing does.

    The words of a :class:`UserError` are ours and the user's, and are not taken for a library's.
    """
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if not isinstance(one, UserError):
            text = str(one).lower()
            named = any(kind.__name__ == "OutOfMemoryError" for kind in type(one).__mro__)  # torch's
            if named or isinstance(one, MemoryError) or getattr(one, "errno", None) == errno.ENOMEM:
                return one
            if any(words in text for words in OUT_OF_MEMORY):
                return one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return None
