"""Linux control groups, versions 1 and 2: those that this process is in, and the memory that they leave it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, MOUNT = Path("/proc"), Path("/sys/fs/cgroup")
NO_LIMIT = 2**62  # version 1 writes "none" as the largest page-aligned signed 64-bit number


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A tree of control groups that counts memory.

    Attributes:
        version: 1 or 2.
        groups: this process's own, then those around it, up to the root.
    """

    version: int
    groups: list[Path]


def membership(proc: Path = PROC) -> str:
    """Returns which control groups this process is in, as the kernel says it; empty where it does not."""
    try:
        return (proc / "self" / "cgroup").read_text(encoding="utf-8")
    except OSError:
        return ""


def memory_hierarchies(membership: str, mount: Path = MOUNT) -> Iterator[Hierarchy]:
    """Yields the hierarchies that count memory.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mount: where the control groups are mounted.
    """
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, root = 2, mount
        elif "memory" in controllers.split(","):
            version, root = 1, mount / "memory"
        else:
            continue
        yield Hierarchy(version, _groups(root, path))


def headroom(membership: str, mount: Path = MOUNT) -> int | None:
    """Returns the bytes left under the tightest memory limit of this process's control groups.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mount: where the control groups are mounted.

    Returns:
        Limit less usage, the reclaimable file cache not counted as usage; None when no limit is in force.
    """
    left = []
    for hierarchy in memory_hierarchies(membership, mount):
        if hierarchy.version == 2:
            limits, usage, cache = ["memory.max", "memory.high"], "memory.current", "inactive_file"
        else:
            limits, usage, cache = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file"
        for group in hierarchy.groups:
            bounds = [bound for name in limits if (bound := _read_int(group / name)) is not None]
            used = _read_int(group / usage)
            if bounds and used is not None and min(bounds) < NO_LIMIT:
                left.append(max(0, min(bounds) - max(0, used - _stat_value(group / "memory.stat", cache))))
    return min(left, default=None)


def throttled_s(membership: str, mount: Path = MOUNT) -> float | None:
    """Returns for how long a limit on CPU time has held this process's control groups back, in seconds of a core.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mount: where the control groups are mounted.

    Returns:
        Of the groups that it is in, the longest; None where no group counts it.
    """
    found = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots, key, unit_s = [mount], "throttled_usec", 1e-6
        elif "cpu" in controllers.split(","):
            roots, key, unit_s = [mount / controllers, mount / "cpu"], "throttled_time", 1e-9
        else:
            continue
        for root in roots:
            for group in _groups(root, path):
                with contextlib.suppress(OSError):
                    if key in (group / "cpu.stat").read_text(encoding="utf-8"):
                        found.append(_stat_value(group / "cpu.stat", key) * unit_s)
    return max(found, default=None)


def _groups(root: Path, path: str) -> list[Path]:
    """Returns a group of a hierarchy, then those around it, up to the root."""
    # A container often sees its own group mounted as the root, and not the path it has on the host.
    parts = [part for part in path.split("/") if part]
    parts = [] if ".." in parts else parts
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


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
