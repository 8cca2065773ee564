"""``auto`` of ``engine.token_budget``, ``max_sequences`` and ``kv_memory``, made numbers before a rank is started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.basics.errors import UserError
from harness.config.checks import AUTO
from harness.config.devices import option_of
from harness.config.schema import Accelerator, Config, HardwareConfig
from harness.costs import lengths, pass_sizes
from harness.costs.pass_sizes import PassSizes
from harness.machine import device
from harness.running import preflight
from harness.running.target import Target

if TYPE_CHECKING:
    from harness.running.job import Job

KEYS = ("token_budget", "max_sequences")
SETTLED = (*KEYS, "kv_memory")


def with_cache(config: Config, settings: dict[str, Any], accelerator: str) -> tuple[Config, dict[str, Any]]:
    """Returns both with a number for ``engine.kv_memory: auto``: what kind of device it is decides."""
    if getattr(config.engine, "kv_memory", None) != AUTO:
        return config, settings
    number = {"kv_memory": pass_sizes.CACHE_PARTS[accelerator]}
    engine = replace(config.engine, **number)  # type: ignore[arg-type]
    return replace(config, engine=engine), settings | {"engine": settings["engine"] | number}


def settle(job: Job, machine: Target) -> Job:
    """Returns the job with numbers for both, for its split on ``machine``; the same job where both were given.

    A job that was settled before is settled anew from what was asked.
    """
    given = [getattr(job.config.engine, key, None) for key in KEYS]
    asked = tuple(None if value == AUTO else value for value in given) if job.sizes is None else job.sizes.asked
    if None not in asked or (job.sizes is None and AUTO not in given):
        return job
    found = _sizes((asked[0], asked[1]), job, machine)
    numbers = {"token_budget": found.token_budget, "max_sequences": found.max_sequences}
    engine = replace(job.config.engine, **numbers)  # type: ignore[arg-type]
    settings = job.settings | {"engine": job.settings["engine"] | numbers}
    return replace(job, config=replace(job.config, engine=engine), settings=settings, sizes=found)


def _sizes(asked: tuple[int | None, int | None], job: Job, machine: Target) -> PassSizes:
    if machine.accelerator == "cpu":
        return pass_sizes.choose(asked, "cpu", None, None, None)
    hardware = _hardware(job, machine)
    try:
        shape = preflight.model_shape(job)
    except UserError:  # its sizes are not known before it is downloaded
        shape = None
    knee = pass_sizes.knee(hardware, job.dtype, shape)
    return pass_sizes.choose(asked, machine.accelerator, machine.memory.size, knee, _fitting(job, machine))


def _hardware(job: Job, machine: Target) -> HardwareConfig:
    """Returns the device's figures; with the default ``hardware=cpu``, those of the option that names this GPU."""
    given = job.config.hardware
    if given.accelerator is not Accelerator.cpu or not machine.here:
        return given
    return option_of(device.device_name(machine.accelerator)) or given


def _fitting(job: Job, machine: Target) -> float | None:
    """Returns how many sequences of the dataset's mean length the KV cache of a replica holds; None if not known."""
    needs, memory = preflight.memory_needs(job), machine.memory
    found = lengths.of(job.workload.requests, job.max_context, job.config.generation.max_output_len)
    if needs is None or memory.size is None or not found.items:
        return None
    left = max(0, memory.size - memory.own - needs.weights(job.tp))
    return needs.cache(left) / max(1, needs.held(1, job.tp)) / found.mean_held
