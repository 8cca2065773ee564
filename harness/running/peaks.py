"""What one rank's device can compute at most, for ``model_flops_utilisation``: given, looked up, or measured."""

from __future__ import annotations

from dataclasses import asdict

from harness.config.devices import option_of
from harness.config.schema import Accelerator
from harness.costs.fitted import rank_peak
from harness.machine import device, memory, probe
from harness.running.context import RunContext

HOW = "best rate of short matrix products, a thread a core, and of reading a matrix larger than the caches"


def find(run: RunContext) -> float | None:
    """Returns the peak rate (FLOP/s) of a rank in the run's type; None where nobody knows it. All ranks must call it.

    What the config has wins. A CPU that it says nothing of is measured, on rank 0 alone while the others wait: its
    cores stand for theirs. A GPU under the default ``hardware=cpu`` has the figures of the option that names it.
    """
    job, hardware = run.job, run.job.config.hardware
    given = rank_peak(hardware, job.dtype, run.rank.local_world)
    if given is not None or hardware.accelerator is not Accelerator.cpu:
        return given
    if job.accelerator == "cpu":
        peak = _measured(run) if run.rank.first else None
        if run.replicas is not None:
            run.replicas.barrier()
        return peak
    known = option_of(device.device_name(job.accelerator)) if run.rank.first else None
    if known is None:
        return None
    run.note(hardware_known=known.name)
    return known.peak_flops.get(job.dtype)


def _measured(run: RunContext) -> float | None:
    """Returns what rank 0's cores do, and writes down when and how that was found; None where it cannot be."""
    dtype = run.job.dtype
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        run.say(line)

    try:
        found = probe.figures(dtype, say=say)
    except RuntimeError as error:  # torch lacks a product in this type: the run itself may do without
        run.notes.append(f"model_flops_utilisation is unknown: {dtype} products could not be measured: {error}")
        return None
    if told:
        memory.forget_peak_memory("cpu")  # what the measuring took is none of the run's
    run.note(hardware_measured=asdict(found) | {"how": HOW, "earlier": not told})
    if not run.crowded:
        return found.peak_flops
    # Measured alone with all cores at hand, of which it has a part as soon as the others work too.
    cores, threads = (found.machine[name] for name in ("cores", "threads"))
    return found.peak_flops * cores / (run.rank.local_world * min(threads, cores))
