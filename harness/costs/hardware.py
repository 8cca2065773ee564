"""The figures of the device that something is planned for, those that a CPU was measured to have among them."""

from __future__ import annotations

from dataclasses import replace

from harness.basics.errors import UserError
from harness.config.schema import Accelerator, HardwareConfig
from harness.machine import probe


def complete(hardware: HardwareConfig, dtype: str, ranks: int = 1) -> HardwareConfig:
    """Returns the config with a peak in ``dtype`` and a memory bandwidth, from the cache where a CPU's are not given.

    Nothing is measured, and torch is not imported.

    Args:
        dtype: one of :data:`harness.config.checks.PEAK_DTYPES`.
        ranks: that share this host, and its cores.

    Raises:
        UserError: a figure is not known; says what measures it.
    """
    found = known(hardware, dtype, ranks)
    for key, figure in (
        (f"peak_flops.{dtype}", found.peak_flops.get(dtype)),
        ("memory_bandwidth", found.memory_bandwidth),
    ):
        if figure is None:
            raise UserError(f"hardware.{key}", f"not known for hardware={hardware.name}", _remedy(hardware, dtype))
    return found


def known(hardware: HardwareConfig, dtype: str, ranks: int = 1) -> HardwareConfig:
    """Returns the config with what was measured of this CPU where its figures are null; see :func:`complete`."""
    found = probe.measured(dtype, ranks) if hardware.accelerator is Accelerator.cpu else None
    if found is None:
        return hardware
    peaks = hardware.peak_flops | {dtype: hardware.peak_flops.get(dtype) or found.peak_flops}
    return replace(hardware, peak_flops=peaks, memory_bandwidth=hardware.memory_bandwidth or found.memory_bandwidth)


def _remedy(hardware: HardwareConfig, dtype: str) -> str:
    if hardware.accelerator is not Accelerator.cpu:
        return "give it, or choose another model.dtype or hardware="
    return f"give it, or have it measured with as many cores and OMP_NUM_THREADS as a rank has: {probe.COMMAND} {dtype}"
