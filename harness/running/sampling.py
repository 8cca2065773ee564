"""Whose telemetry a rank takes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from harness.machine.energy import bus_ids
from harness.machine.telemetry import SERIES, Sampler
from harness.ranks.rank import Rank


def of_rank(rank: Rank, accelerator: str, all_gpus: bool, directory: Path | None) -> Sampler | None:
    """Returns the sampler of this rank's host, at work; None on all ranks of the host but one.

    Args:
        accelerator: ``cpu`` or ``cuda``.
        all_gpus: whether the run may use every GPU that this process sees, not one a rank.
        directory: the run's, on rank 0, which alone writes the series.
    """
    if rank.local_rank != 0:
        return None
    gpus = bus_ids(None if all_gpus else rank.local_world) if accelerator == "cuda" else []
    sampler = Sampler(directory / SERIES if directory is not None else None, gpus, ranks_here(rank))
    sampler.start()
    return sampler


def ranks_here(rank: Rank) -> list[psutil.Process]:
    """Returns the processes of this launch's ranks on this host: its launcher's children, this one among them."""
    me = psutil.Process()
    if rank.local_world == 1:
        return [me]
    found = []
    port = os.environ.get("MASTER_PORT")
    with contextlib.suppress(psutil.Error, AttributeError):
        for process in me.parent().children():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if "LOCAL_RANK" in variables and variables.get("MASTER_PORT") == port:
                    found.append(process)
    return found or [me]
