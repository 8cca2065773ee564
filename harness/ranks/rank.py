"""Which rank of the launch this process is, and what launchers do to its command line."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from harness.basics.errors import UserError, quoted

RUN_ID_VARIABLE = "HARNESS_RUN_ID"
PARENT_VARIABLE = "HARNESS_PARENT_PID"
# What a launcher tells its ranks; a launch that one of them starts must not inherit it.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
ENCODED = "--encoded="
GUIDE = "see launch/NODES.md"


def free_port() -> int:
    """Returns a TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a launch, as DeepSpeed's launcher numbers it.

    Attributes:
        rank, world: number of this process among all, and how many there are.
        local_rank, local_world: the same on this host.
        host: number of this host among the launch's.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the run directory and the terminal."""
        return self.rank == 0

    @property
    def several_hosts(self) -> bool:
        """Whether the launch spans several hosts."""
        return self.local_world < self.world


def rank_of(environment: Mapping[str, str]) -> Rank | None:
    """Returns the rank that a launcher has made of this process, or None when none has.

    Raises:
        UserError: it is one of several that MPI or srun started, which do not say where rank 0 is.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        # Each would take itself for a whole run, and start the ranks of one.
        for variable in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
            if environment.get(variable, "").isdecimal() and int(environment[variable]) > 1:
                raise UserError(
                    "launch",
                    f"{variable}={environment[variable]}, but no RANK: this launcher does not number the ranks",
                    f"start one deepspeed --no_ssh on each host; {GUIDE}",
                )
        return None
    world = int(environment["WORLD_SIZE"])
    return Rank(
        rank=int(environment["RANK"]),
        world=world,
        local_rank=int(environment["LOCAL_RANK"]),
        local_world=int(environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or world),
        host=int(environment.get("CROSS_RANK") or environment.get("GROUP_RANK") or 0),
    )


def check_world(rank: Rank, tp: int, dp: int) -> None:
    """Raises UserError unless the launch has as many ranks as the config asks for."""
    if rank.world != tp * dp:
        raise UserError(
            "parallel",
            f"tp={tp} x dp={dp} needs {tp * dp} ranks, the launch has {rank.world}",
            f"launch with --num_gpus {tp * dp} (--num_accelerators on cpu), or set parallel.tp and parallel.dp"
            if not rank.several_hosts
            else "give the hostfile as many slots, or set parallel.tp and parallel.dp",
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


def encoded(arguments: list[str]) -> str:
    """Returns ``arguments`` as one word that no shell and no pdsh changes; :func:`decoded` takes it apart."""
    return ENCODED + base64.urlsafe_b64encode(json.dumps(arguments).encode()).decode().rstrip("=")


def decoded(arguments: list[str]) -> list[str]:
    """Returns the command line with what :func:`encoded` made of a part of it put back.

    Raises:
        UserError: such a word is damaged.
    """
    plain: list[str] = []
    for argument in arguments:
        if not argument.startswith(ENCODED):
            plain.append(argument)
            continue
        word = argument.removeprefix(ENCODED)
        try:
            inner = json.loads(base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True))
        except ValueError:
            inner = None
        if not isinstance(inner, list) or not all(isinstance(part, str) for part in inner):
            raise UserError(ENCODED.rstrip("="), f"{quoted(word)} is damaged", "launch/multi_node.py makes it")
        plain += inner
    return plain


def current() -> Rank | None:
    """Returns :func:`rank_of` this process's environment."""
    return rank_of(os.environ)
