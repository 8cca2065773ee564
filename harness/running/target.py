"""The machine that a job is for: this one, or one that ``conf/hardware`` describes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.config.schema import Config, HardwareConfig
from harness.costs.memory import Memory
from harness.engines import catalogue
from harness.machine import device, numa, snapshot
from harness.machine.memory import available_memory_bytes
from harness.ranks.rank import Rank, current
from harness.running.split import Launch

# That a process holds for itself once torch and DeepSpeed are imported (measured: 313 to 324 MiB).
RANK_BYTES = 300 * 2**20
DEVICE_BYTES = 2 * 2**30  # of a GPU, for CUDA's context, NCCL's buffers and what a pass computes
HOST_DEVICES = 8  # of a described machine that does not say how many it has


@dataclass(frozen=True, slots=True)
class Target:
    """What decides how a job can be split, and what fits.

    Attributes:
        accelerator: ``cpu`` or ``cuda``, what the ranks run on.
        launch: the ranks that the job has, or can have.
        memory: what its ranks find.
        here: whether it is this machine.
    """

    accelerator: str
    launch: Launch
    memory: Memory
    here: bool = True


def this_machine(config: Config, accelerator: str, rank: Rank | None) -> Target:
    """Returns this machine, seen by ``rank`` of a launch, or by the process that is to start one."""
    launch = _launch(rank, accelerator, config.engine.name)
    if accelerator == "cpu":
        cores = numa.affinity()
        nodes = numa.nodes(cores)
        if launch.ranks is None:
            launch = replace(launch, nodes=numa.replicas(nodes))
        asked = (config.parallel.tp or 1) * (config.parallel.dp or 1)
        bound = numa.least_bytes(max(launch.host_ranks, launch.nodes, asked), cores, nodes)
        memory = Memory(available_memory_bytes(), True, RANK_BYTES, bound)
    else:
        memory = Memory(snapshot.device_memory_bytes() or config.hardware.memory_bytes, False, DEVICE_BYTES)
    return Target(accelerator, launch, memory)


def described(hardware: HardwareConfig, ranks: int | None = None) -> Target:
    """Returns a machine of such devices.

    Args:
        ranks: of the launch, one a device; None where as few are started as it takes.
    """
    hosts_devices = hardware.devices_per_node or HOST_DEVICES
    accelerator = hardware.accelerator.value
    if accelerator == "cpu":
        memory = Memory(hardware.memory_bytes or available_memory_bytes(), True, RANK_BYTES)
    else:
        memory = Memory(hardware.memory_bytes, False, DEVICE_BYTES)
    launch = Launch(ranks, hosts_devices if ranks is None else min(ranks, hosts_devices))
    return Target(accelerator, launch, memory, here=False)


def _launch(rank: Rank | None, accelerator: str, engine: str) -> Launch:
    """Returns the ranks that a job has here, or can have."""
    if rank is not None:
        return Launch(rank.world, rank.local_world)
    if (outer := current()) is not None:  # the first rank of a launch drives several, each of its own
        return Launch(outer.world, outer.local_world, fixed=False)
    # Shards on a CPU would share the memory that they have to read anyway, and one rank of some engines takes all GPUs.
    alone = accelerator == "cpu" or catalogue.find(engine).spreads
    return Launch(None, 1 if alone else device.cuda_devices())
