"""Which rank of the launch this process is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import UserError


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a launch, as DeepSpeed's launcher numbers it.

    Attributes:
        rank, world: number of this process among all, and how many there are.
        local_rank, local_world: the same on this host.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the run directory and the terminal."""
        return self.rank == 0


def rank_of(environment: Mapping[str, str]) -> Rank | None:
    """Returns the rank that a launcher has made of this process, or None when none has."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        return None
    world = int(environment["WORLD_SIZE"])
    return Rank(
        rank=int(environment["RANK"]),
        world=world,
        local_rank=int(environment["LOCAL_RANK"]),
        local_world=int(environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or world),
    )


def check_world(rank: Rank, tp: int, dp: int) -> None:
    """Raises UserError unless the launch has as many ranks as the config asks for."""
    if rank.world != tp * dp:
        raise UserError(
            "parallel",
            f"tp={tp} x dp={dp} needs {tp * dp} ranks, the launch has {rank.world}",
            f"launch with --num_gpus {tp * dp} (--num_accelerators on cpu), or set parallel.tp and parallel.dp",
        )


def without_local_rank(arguments: list[str]) -> list[str]:
    """Returns the command line without the ``--local_rank=N`` that DeepSpeed's launcher puts in front."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def current() -> Rank | None:
    """Returns :func:`rank_of` this process's environment."""
    return rank_of(os.environ)


def bind_cores(rank: Rank) -> None:
    """Binds this process to its share of the host's cores; with fewer cores than ranks, to none in particular."""
    if rank.local_world == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // rank.local_world
    if share:
        os.sched_setaffinity(0, cores[rank.local_rank * share : (rank.local_rank + 1) * share])
