"""How much memory there is, how much was taken, and whether the kernel killed a process because it ran out."""

from __future__ import annotations

import contextlib
import errno
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from harness.basics.errors import UserError
from harness.machine import cgroups

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
    headroom = cgroups.headroom(cgroups.membership())
    return available if headroom is None else min(available, headroom)


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


def give_back(device: str) -> None:
    """Gives back what nothing refers to any more: to the system, and from torch's own pools to the device."""
    gc.collect()
    if device.startswith("cuda") and (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()


class OomKills:
    """Whether the kernel has ended a process because memory ran out, since this was made.

    Counted for our control group where it counts them (its ``memory.events``; ``memory.oom_control`` in version
    1), else for the machine (``/proc/vmstat``), where another's process may be meant.

    Args:
        proc, mount: where the kernel shows processes and control groups.
    """

    def __init__(self, proc: Path = cgroups.PROC, mount: Path = cgroups.MOUNT) -> None:
        self._proc, self._mount = proc, mount
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
        for hierarchy in cgroups.memory_hierarchies(cgroups.membership(self._proc), self._mount):
            name = "memory.events" if hierarchy.version == 2 else "memory.oom_control"
            counts = [group / name for group in (hierarchy.groups[0], hierarchy.groups[-1])]
            yield from [path for path in counts if path.is_file()][:1]
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
