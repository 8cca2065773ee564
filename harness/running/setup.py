"""What every rank does before it loads a model, whatever it is started for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.costs import hardware
from harness.machine import device, numa
from harness.machine.numa import Place
from harness.models import token_counts
from harness.ranks.rank import Rank
from harness.ranks.rendezvous import Rendezvous
from harness.running import target
from harness.running.job import Job
from harness.running.preflight import held_tokens, memory_needs

if TYPE_CHECKING:
    from harness.engines.base import Described, EngineSettings
    from harness.ranks.replicas import Replicas


def use_cores(job: Job, rank: Rank) -> tuple[bool, Place | None]:
    """Gives each rank of this host cores of its own, and a thread a core unless the user chose a number.

    Returns:
        Whether there are fewer cores than ranks, so that none has a core of its own; and what this one is bound to.
    """
    crowded = device.cores() < rank.local_world
    place = numa.bind(rank.local_rank, rank.local_world) if job.accelerator == "cpu" else None
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if crowded else device.cores())
    return crowded, place


def join(job: Job, rank: Rank, rendezvous: Rendezvous) -> Replicas | None:
    """Returns the ranks of the launch, once all have joined their process group; None for a lone rank."""
    if rank.world == 1:
        return None
    from harness.ranks.replicas import Replicas  # imports torch when it joins; ranks that are refused never do

    replicas = Replicas(rank, job.accelerator, rendezvous, job.tp)
    replicas.join()
    return replicas


def engine_settings(job: Job, rank: Rank, replicas: Replicas | None, place: Place | None = None) -> EngineSettings:
    """Returns the settings of this rank's engine.

    Args:
        replicas: the ranks of the launch, which have met; None for a lone one.
        place: what this rank is bound to; None for nothing.
    """
    from harness.engines.base import EngineSettings
    from harness.engines.shared.order import lookahead

    config = job.config
    if job.simulated:
        torch_device = job.accelerator
    else:
        torch_device = "cpu" if job.accelerator == "cpu" else f"cuda:{rank.local_rank}"
    return EngineSettings(
        engine=config.engine,
        generation=config.generation,
        source=job.source,
        dtype=job.dtype,
        device=torch_device,
        max_context=job.max_context,
        held_tokens=held_tokens(job),
        lookahead=lookahead(job.dp),
        tensor=replicas.tensor if replicas is not None else None,
        host_ranks=rank.local_world,
        place=place,
        described=_described(job) if job.simulated else None,
    )


def _described(job: Job) -> Described:
    """Returns the machine that a simulated job is for, and its ranks; raises UserError for figures not known."""
    from harness.engines.base import Described

    config = job.config
    machine = target.described(config.hardware, job.ranks)
    return Described(
        hardware=hardware.complete(config.hardware, job.dtype, machine.launch.host_ranks),
        tp=job.tp,
        dp=job.dp,
        host_ranks=machine.launch.host_ranks,
        memory=machine.memory,
        needs=memory_needs(job),
        encode=token_counts.encoder(config.model, job.source),
        seed=config.dataset.seed,
    )
