"""Whether two processes can add numbers together: over NCCL between all pairs of GPUs, over gloo on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from harness.doctor.background import Background
from harness.doctor.findings import Findings
from harness.ranks.rank import free_port

AREA = "network"
START_S = 90.0  # for a process to import torch
PAIR_S = 40.0  # for two that are there; NCCL takes seconds to begin
REMEDIES = {
    "nccl": "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 or a larger /dev/shm (--shm-size) often mends it",
    "gloo": "GLOO_SOCKET_IFNAME=lo helps where this host's own name leads nowhere",
}
Places = tuple[int, int]


class Pairs:
    """A process for each place, which begins at once; a place is a GPU, or one of two processes on the CPU.

    Args:
        backend: ``nccl`` or ``gloo``.
        places: the places' numbers.
    """

    def __init__(self, backend: str, places: Sequence[int]) -> None:
        self.backend = backend
        self.places = list(places)
        self._processes = {place: self._started(place) for place in self.places}
        self._until = time.monotonic() + START_S
        self._lacks: dict[int, str | None] = {}  # by place, why its process is not there

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes.values():
            process.close()

    def tried(self) -> Iterator[tuple[Places, str | None, float | None]]:
        """Yields each pair with what went wrong, None for nothing, and the bytes/s of its sum where it was timed."""
        for place in self.places:
            if place not in self._lacks:
                self._lacks[place] = self._ready(place)
        for turn in rounds(self.places):
            with ThreadPoolExecutor(len(turn)) as pool:
                for pair, (error, rate) in zip(turn, pool.map(self._one, turn), strict=True):
                    yield pair, error, rate

    def _started(self, place: int) -> Background:
        device = f"cuda:{place}" if self.backend == "nccl" else "cpu"
        return Background("harness.doctor.pair", [self.backend, device])

    def _ready(self, place: int) -> str | None:
        """Waits for a place's process; returns why it is not there, None if it is."""
        process = self._processes[place]
        if process.answer(self._until) is not None:
            return None
        why = f"torch was not imported within {START_S:.0f} s" if process.running else process.ended()
        process.close()
        return why

    def _one(self, pair: Places) -> tuple[str | None, float | None]:
        for place in pair:
            if self._lacks[place] is None and not self._processes[place].running:  # the pair before has ended it
                self._processes[place] = self._started(place)
                self._until = time.monotonic() + START_S
                self._lacks[place] = self._ready(place)
            if (why := self._lacks[place]) is not None:
                return why, None
        port, until = free_port(), time.monotonic() + PAIR_S
        both = [self._processes[place] for place in pair]
        for rank, process in enumerate(both):
            process.ask({"rank": rank, "port": port, "limit_s": 0.8 * PAIR_S})  # its own word of it comes first
        answers = [process.answer(until) for process in both]
        for process, answer in zip(both, answers, strict=True):
            if answer is None:  # whoever is left may wait for ever
                why = f"no answer within {PAIR_S:.0f} s" if process.running else process.ended()
                for one in both:
                    one.close()
                return why, None
        errors = [answer["error"] for answer in answers if answer is not None and answer["error"] is not None]
        return (errors[0], None) if errors else (None, (answers[0] or {}).get("bytes_per_s"))


def rounds(places: Sequence[int]) -> list[list[Places]]:
    """Returns all pairs, in rounds of such that have no place in common: as many at once as there can be."""
    circle: list[int | None] = [*places, *[None] * (len(places) % 2)]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        turn = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in turn if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def check(found: Findings, pairs: Pairs) -> list[str]:
    """Says which pairs can add numbers together; returns what went wrong."""
    wrong, right, rates = [], 0, []
    for (one, other), error, rate in pairs.tried():
        if error is None:
            right += 1
            rates += [rate] if rate is not None else []
            continue
        name = f"cuda:{one} and cuda:{other}" if pairs.backend == "nccl" else "two processes on this host"
        wrong.append(f"{name} cannot add numbers over {pairs.backend}: {error}")
        found.no(AREA, wrong[-1], REMEDIES[pairs.backend])
    if right:
        what = f"{right} pairs of GPUs" if pairs.backend == "nccl" and right > 1 else "two processes on this host"
        what = "cuda:{} and cuda:{}".format(*pairs.places) if pairs.backend == "nccl" and right == 1 else what
        speed = f", 64 MiB at {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s" if rates else ""
        found.ok(AREA, f"{what} add numbers over {pairs.backend}{speed}")
    return wrong
