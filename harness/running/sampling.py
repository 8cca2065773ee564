"""Whose telemetry a rank takes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from harness.basics.errors import UserError
from harness.engines import catalogue
from harness.machine.energy import bus_ids
from harness.machine.power import unmeasured
from harness.machine.telemetry import SERIES, Sampler
from harness.ranks.rank import PARENT_VARIABLE, Rank
from harness.running.job import Job


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
    series = directory / SERIES if directory is not None else None
    sampler = Sampler(series, gpus, ranks_here(rank), launchers_here())
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


def launchers_here() -> list[psutil.Process]:
    """Returns the processes between this rank and the command of ours that has started it, which is the last."""
    with contextlib.suppress(psutil.Error):
        above = psutil.Process().parents()
        for place, process in enumerate(above, start=1):
            if str(process.pid) == os.environ.get(PARENT_VARIABLE):
                return above[:place]
    return []


def check_power(job: Job, rank: Rank | None) -> None:
    """Raises UserError where the run has a power limit that nothing on this host can tell it from having kept.

    Args:
        rank: None where this process is to start the ranks, on this host.
    """
    limit_w = job.config.power_limit_w
    if limit_w is None or (rank is not None and rank.local_rank != 0):
        return
    here = job.ranks if rank is None else rank.local_world
    count = None if catalogue.find(job.config.engine.name).spreads else here
    if (why := unmeasured(job.accelerator, count)) is not None:
        raise UserError("power_limit_w", f"{limit_w:g}: nothing here measures power: {why}", "leave it out")
