"""What one host and each of its GPUs did: read a sample at a time, and summed up."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil

from harness.machine.energy import Gpu, Packages
from harness.machine.memory import available_memory_bytes
from harness.machine.quantities import Quantity, RisingCounter

HOST_COLUMNS = (
    "host_memory_used_bytes",
    "host_memory_available_bytes",
    "ranks_memory_bytes",
    "cpu_utilisation",
    "cpu_energy_j",
)
GPU_COLUMNS = (
    "memory_used_bytes",
    "utilisation",
    "power_w",
    "temperature_c",
    "sm_clock_mhz",
    "throttled",
    "energy_j",
)


class HostMeter:
    """Memory, load and energy of this host.

    Args:
        processes: the run's ranks on this host.
        packages: its processors.
    """

    def __init__(self, processes: Sequence[psutil.Process], packages: Packages) -> None:
        self._processes = list(processes)
        self._packages = packages
        self._values = {name: Quantity() for name in HOST_COLUMNS[:4]}
        self._busy, self._total, self._energy = RisingCounter(), RisingCounter(), RisingCounter()
        self._cpu_last: tuple[float, float] | None = None

    def sample(self, time_s: float | None) -> dict[str, float | None]:
        """Returns what is read now, by column; ``time_s`` is None outside the clock."""
        joules = self._packages.joules()
        busy, total = _cpu_seconds()
        memory = psutil.virtual_memory()
        found: dict[str, float | None] = {
            "host_memory_used_bytes": memory.total - memory.available,
            "host_memory_available_bytes": available_memory_bytes(),
            "ranks_memory_bytes": self._resident(),
            "cpu_utilisation": None,
        }
        if self._cpu_last is not None and total > self._cpu_last[1]:
            share = (busy - self._cpu_last[0]) / (total - self._cpu_last[1])
            found["cpu_utilisation"] = round(min(max(share, 0.0), 1.0), 4)
        self._cpu_last = (busy, total)
        for name, value in found.items():
            self._values[name].add(time_s, value)
        self._busy.add(time_s, busy)
        self._total.add(time_s, total)
        self._energy.add(time_s, joules)
        return found | {"cpu_energy_j": self._energy.since}

    def _resident(self) -> int | None:
        """Returns the resident memory of this host's ranks, in bytes."""
        total = 0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):  # one that has ended
                total += process.memory_info().rss
        return total or None

    def summary(self, scale: float | None) -> dict[str, Any]:
        """Returns what was seen; joules times ``scale``, which is None where they are not known."""
        busy, total, values = self._busy.since, self._total.since, self._values
        return {
            "host_memory_used_peak_bytes": values["host_memory_used_bytes"].peak,
            "host_memory_available_least_bytes": values["host_memory_available_bytes"].least,
            "ranks_memory_peak_bytes": values["ranks_memory_bytes"].peak,
            "ranks_memory_mean_bytes": values["ranks_memory_bytes"].mean,
            "cpu_utilisation_mean": busy / total if busy is not None and total else None,
            "cpu_utilisation_peak": values["cpu_utilisation"].peak,
            "cpu_packages": len(self._packages),
            "cpu_energy_j": _scaled(self._energy, scale),
        }


class GpuMeter:
    """State and energy of one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._values = {name: Quantity() for name in GPU_COLUMNS[:5]}
        self._energy = RisingCounter()
        self._throttled: Counter[str] = Counter()

    def sample(self, time_s: float | None) -> dict[str, Any]:
        """Returns what is read now, by column; ``time_s`` is None outside the clock."""
        now = self._gpu.sample()
        found = {name: getattr(now, name) for name in GPU_COLUMNS[:5]}
        for name, value in found.items():
            self._values[name].add(time_s, value)
        self._energy.add(time_s, now.joules)
        if time_s is not None:
            self._throttled.update(now.throttled or ())
        return found | {"throttled": "|".join(now.throttled or ()), "energy_j": self._energy.since}

    def summary(self, samples: int, scale: float | None) -> dict[str, Any]:
        """Returns what was seen in so many samples; joules times ``scale``, which is None where they are not known."""
        values = self._values
        return {
            "index": self._gpu.index,
            "memory_used_peak_bytes": values["memory_used_bytes"].peak,
            "memory_used_mean_bytes": values["memory_used_bytes"].mean,
            "utilisation_mean": values["utilisation"].mean,
            "power_mean_w": values["power_w"].mean,
            "power_peak_w": values["power_w"].peak,
            "temperature_peak_c": values["temperature_c"].peak,
            "sm_clock_mean_mhz": values["sm_clock_mhz"].mean,
            "sm_clock_least_mhz": values["sm_clock_mhz"].least,
            "throttled_share": {name: seen / samples for name, seen in self._throttled.items()},
            "energy_j": _scaled(self._energy, scale),
            "energy_source": self._gpu.source,
        }


def _scaled(counter: RisingCounter, scale: float | None) -> float | None:
    return None if scale is None or counter.since is None else counter.since * scale


def _cpu_seconds() -> tuple[float, float]:
    """Returns the seconds that this machine's cores have worked, and all that they have had."""
    times = psutil.cpu_times()
    # Linux counts a guest's time as the user's too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
