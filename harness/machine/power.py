"""What a host draws, as far as it is measured: its GPUs by NVML, its processor packages by RAPL. No supply, no fan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.machine.energy import Gpus, Packages, bus_ids

SHORTEST_S = 0.2  # between two readings of joules; over less, their difference is mostly chance


class PowerSeries:
    """The power of a host at each sample within the clock.

    Args:
        cpu_packages: processor packages whose joules will be given.
    """

    def __init__(self, cpu_packages: int) -> None:
        self._packages = cpu_packages
        self._gpus = 0
        self._samples: list[tuple[float, float]] = []
        self._gaps = 0
        self._joules: tuple[float, float] | None = None  # when they were read last, and how many there were
        self._packages_w: float | None = None

    def add(self, time_s: float, gpus_w: Sequence[float | None], joules: float | None) -> None:
        """Takes one sample.

        Args:
            time_s: on the run's clock.
            gpus_w: of each GPU.
            joules: of all packages since the clock's start; None where they are not shown.
        """
        self._gpus = len(gpus_w)
        known = [watts for watts in gpus_w if watts is not None]
        self._gaps += len(known) < len(gpus_w)
        if joules is None:
            self._packages = 0
        elif self._joules is None:
            self._joules = (time_s, joules)
        elif (seconds := time_s - self._joules[0]) >= SHORTEST_S:
            self._packages_w = (joules - self._joules[1]) / seconds  # since the sample before
            self._joules = (time_s, joules)
        drawn = [*known, *([self._packages_w] if self._packages and self._packages_w is not None else [])]
        if drawn:
            self._samples.append((time_s, sum(drawn)))

    def summary(self) -> dict[str, Any]:
        """Returns what was measured, ready for JSON: ``samples`` are pairs of seconds and watts."""
        return {
            "gpus": self._gpus,
            "cpu_packages": self._packages,
            "gaps": self._gaps,
            "samples": [[round(time_s, 3), round(watts, 1)] for time_s, watts in self._samples],
        }


def unmeasured(accelerator: str, count: int | None) -> str | None:
    """Returns why nothing on this host says what the run's devices draw; None where something does.

    Args:
        accelerator: ``cpu`` or ``cuda``.
        count: GPUs of the run on this host; None for all that this process sees.
    """
    if accelerator == "cpu":
        shown = Packages().joules() is not None
        return None if shown else "the kernel shows no energy of the processor packages (RAPL) to this user"
    try:
        nvml = Gpus(bus_ids(count))
    except Exception as error:  # no pynvml, no driver, or a GPU that NVML does not show
        return f"NVML cannot be asked: {type(error).__name__}: {error}"
    try:
        silent = [gpu.index for gpu in nvml.all if gpu.sample().power_w is None]
    finally:
        nvml.close()
    return f"GPU {silent[0]} does not say what it draws" if silent else None
