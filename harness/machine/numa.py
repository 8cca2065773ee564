"""The NUMA nodes of this host: their cores, their memory, and which of both each rank gets."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT_VARIABLE = "HARNESS_NUMA_ROOT"  # a directory that stands for /: the nodes of another machine, or none
NODES = "sys/devices/system/node"
FREE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")  # free, or given up for the asking
EVEN = 2  # times as many cores as another rank, at most, where each node gets a replica of its own


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node.

    Attributes:
        number: the kernel's.
        cores: that this process may use, ascending.
        free: bytes of its memory that are free or can be had.
    """

    number: int
    cores: tuple[int, ...]
    free: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank belongs on its host.

    Attributes:
        cores: its own.
        nodes: numbers of the NUMA nodes that these are in; none where the host has one, or does not show them.
        ranks: of the host that share these nodes.
    """

    cores: tuple[int, ...]
    nodes: tuple[int, ...]
    ranks: int


def affinity() -> list[int]:
    """Returns the cores that this process may use, which its control group narrows too; none where none are told."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def nodes(cores: Collection[int] | None = None, root: Path | None = None) -> list[Node]:
    """Returns the nodes with cores and memory that this process may use; none where the host does not show them.

    The cores of a node whose memory it may not use, or that has none, count to the nearest node.

    Args:
        cores: that may be used; None for this process's.
        root: where the kernel's file systems are found; None for this machine's.
    """
    root = _root() if root is None else root
    cores = affinity() if cores is None else cores
    numbers = sorted(int(path.name[4:]) for path in (root / NODES).glob("node*") if path.name[4:].isdecimal())
    allowed = _allowed(root)
    memory = {number: _meminfo(root, number) for number in numbers}
    own = [number for number in numbers if memory[number].get("MemTotal") and (allowed is None or number in allowed)]
    if not own:
        return []
    having: dict[int, list[int]] = {number: [] for number in own}
    for number in numbers:
        nearest = number if number in having else min(own, key=_distances(root, number, numbers).__getitem__)
        having[nearest] += _listed(root / NODES / f"node{number}" / "cpulist").intersection(cores)
    if sum(map(len, having.values())) != len(set(cores)):
        return []  # cores that no node has: what is shown is not this machine
    return [
        Node(number, tuple(sorted(mine)), sum(memory[number].get(name, 0) for name in FREE))
        for number, mine in having.items()
        if mine
    ]


def free_bytes(numbers: Collection[int], root: Path | None = None) -> int:
    """Returns the bytes of these nodes' memory that are free or can be had."""
    root = _root() if root is None else root
    return sum(_meminfo(root, number).get(name, 0) for number in numbers for name in FREE)


def places(ranks: int, cores: Sequence[int], nodes: Sequence[Node]) -> list[Place]:
    """Returns where each of ``ranks`` of a host belongs; none where it has fewer cores than ranks.

    No rank straddles nodes unless it has whole ones: several nodes are a rank's where there are fewer ranks than nodes,
    and several ranks share a node, evenly, where there are more.

    Args:
        cores: all that there are, ascending.
        nodes: that these are in; with none or one, the cores are divided evenly.
    """
    if ranks > len(cores):
        return []
    if len(nodes) < 2:
        share = len(cores) // ranks
        parts = [tuple(cores[rank * share : (rank + 1) * share]) for rank in range(ranks)]
        return [Place(part, (), ranks) for part in parts]
    if ranks <= len(nodes):
        groups = [nodes[len(nodes) * rank // ranks : len(nodes) * (rank + 1) // ranks] for rank in range(ranks)]
        return [
            Place(tuple(core for node in group for core in node.cores), tuple(node.number for node in group), 1)
            for group in groups
        ]
    counts = [1] * len(nodes)
    for _ in range(ranks - len(nodes)):
        counts[max(range(len(nodes)), key=lambda i: len(nodes[i].cores) / (counts[i] + 1))] += 1
    found = []
    for node, count in zip(nodes, counts, strict=True):
        found += [Place(one.cores, (node.number,), count) for one in places(count, node.cores, ())]
    return found


def replicas(nodes: Sequence[Node]) -> int:
    """Returns how many replicas the nodes should have, one each: fewer where some have far fewer cores than others."""
    cores = sorted(core for node in nodes for core in node.cores)
    for ranks in range(len(nodes), 1, -1):
        sizes = [len(place.cores) for place in places(ranks, cores, nodes)]
        if max(sizes) <= EVEN * min(sizes):
            return ranks
    return 1


def least_bytes(most: int, cores: Sequence[int], nodes: Sequence[Node]) -> tuple[int, ...]:
    """Returns the bytes that each of 1, 2, ... ``most`` ranks of a host finds in its nodes, the poorest of them.

    Args:
        cores, nodes: as for :func:`places`; none are returned where there are no two nodes, or cores for all ranks.
    """
    if len(nodes) < 2:
        return ()
    free = {node.number: node.free for node in nodes}
    found = []
    for ranks in range(1, min(most, len(cores)) + 1):
        bound = places(ranks, cores, nodes)
        found.append(min(sum(free[number] for number in place.nodes) // place.ranks for place in bound))
    return tuple(found)


def bind(local_rank: int, ranks: int) -> Place | None:
    """Binds this process to its place among the host's ``ranks``; returns it.

    Memory is then taken from its own nodes as it is first written to. None where it stays as it was: a lone rank, one
    of more ranks than cores, or a system that does not bind.
    """
    if ranks == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = affinity()
    found = places(ranks, cores, nodes(cores))
    if not found:
        return None
    os.sched_setaffinity(0, found[local_rank].cores)
    return found[local_rank]


def _root() -> Path:
    return Path(os.environ.get(ROOT_VARIABLE) or "/")


def _allowed(root: Path) -> set[int] | None:
    """Returns the nodes whose memory this process may use, by its control group or by itself; None if not told."""
    try:
        lines = (root / "proc" / "self" / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((_numbers(line.partition(":")[2]) for line in lines if line.startswith("Mems_allowed_list:")), None)


def _meminfo(root: Path, number: int) -> dict[str, int]:
    """Returns what the kernel says of a node's memory, in bytes."""
    try:
        lines = (root / NODES / f"node{number}" / "meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]  # Node 0 MemFree: 1024 kB
    return {word[2].rstrip(":"): int(word[3]) * 1024 for word in words if len(word) == 5 and word[3].isdecimal()}


def _distances(root: Path, number: int, numbers: Sequence[int]) -> dict[int, int]:
    """Returns how far each node is from one; by their numbers where the kernel does not say."""
    try:
        text = (root / NODES / f"node{number}" / "distance").read_text(encoding="utf-8")
        return dict(zip(numbers, map(int, text.split()), strict=True))
    except (OSError, ValueError):
        return {other: abs(other - number) for other in numbers}


def _listed(path: Path) -> set[int]:
    try:
        return _numbers(path.read_text(encoding="utf-8"))
    except OSError:
        return set()


def _numbers(text: str) -> set[int]:
    """Returns the numbers of such a list as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last if last.isdecimal() else first) + 1))
    return found
