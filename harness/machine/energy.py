"""Devices that say what they draw: GPUs through NVML, processor packages through RAPL. Soft: a gap is None."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine.device import cuda_devices, cuda_driver

POWERCAP = Path("/sys/class/powercap")
# What slows a GPU down; its being idle, or the clocks that an administrator set, are no faults of the run.
THROTTLES = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
}


class Packages:
    """Joules of the host's processor packages since this was made, from RAPL.

    Args:
        powercap: where the kernel shows its power zones, ``/sys/class/powercap``.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # A package can be listed twice, by its registers (intel-rapl:0) and by its memory (intel-rapl-mmio:0).
        self._zones: dict[str, Path] = {}
        for zone in sorted(powercap.glob("intel-rapl*:*")):
            with contextlib.suppress(OSError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package"):
                    self._zones[name] = zone
        self._last: dict[str, int] = {}
        self._joules: float | None = 0.0 if self._zones else None

    def __len__(self) -> int:
        return len(self._zones)

    def joules(self) -> float | None:
        """Returns the joules since the first call; None without RAPL, or once a package could not be read."""
        if self._joules is None:
            return None
        try:
            for name, zone in self._zones.items():
                now = int((zone / "energy_uj").read_text())
                gone = now - self._last.get(name, now)
                if gone < 0:  # the counter starts again at 0 after its highest value
                    gone += int((zone / "max_energy_range_uj").read_text()) + 1
                self._last[name] = now
                self._joules += gone / 1e6
        except (OSError, ValueError):  # since 2020 the kernel shows it to root alone
            self._joules = None
        return self._joules


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU at one moment; ``joules`` count from an arbitrary start. None is what it does not tell."""

    memory_used_bytes: int | None
    utilisation: float | None  # 0..1, of the time since NVML last looked
    power_w: float | None
    temperature_c: int | None
    sm_clock_mhz: int | None
    throttled: tuple[str, ...] | None
    joules: float | None


class Gpu:
    """One GPU, by the handle of ``pynvml``; each quantity is left out if this GPU or its driver does not have it."""

    def __init__(self, nvml: Any, handle: Any, index: int) -> None:
        self.index = index  # as the ranks number it: cuda:<index>
        self._power = self._working(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        self._counter = self._working(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        self._memory = self._working(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used))
        self._utilisation = self._working(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        self._temperature = self._working(
            lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            lambda: int(nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU)),
        )
        self._clock = self._working(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))
        self._reasons = self._working(
            lambda: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
            lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        )
        self._integrated = 0.0
        self._last: tuple[float, float] | None = None  # when, and the power then

    @property
    def source(self) -> str | None:
        """Where the joules come from: ``nvml counter``, or ``nvml power, integrated``."""
        if self._counter is not None:
            return "nvml counter"
        return "nvml power, integrated" if self._power is not None else None

    def sample(self) -> GpuSample:
        """Returns the state of this moment."""
        power, reasons = _value(self._power), _value(self._reasons)
        return GpuSample(
            memory_used_bytes=_value(self._memory),
            utilisation=_value(self._utilisation),
            power_w=power,
            temperature_c=_value(self._temperature),
            sm_clock_mhz=_value(self._clock),
            throttled=None if reasons is None else tuple(name for bit, name in THROTTLES.items() if reasons & bit),
            joules=self._integrate(power) if self._counter is None else _value(self._counter),
        )

    def _integrate(self, power: float | None) -> float | None:
        if power is None:
            return None
        now = time.monotonic()
        if self._last is not None:
            self._integrated += (power + self._last[1]) / 2 * (now - self._last[0])
        self._last = (now, power)
        return self._integrated

    @staticmethod
    def _working(*readings: Callable[[], Any]) -> Callable[[], Any] | None:
        """Returns the first of several ways to read a quantity that this GPU has."""
        return next((reading for reading in readings if _value(reading) is not None), None)


def _value(reading: Callable[[], Any] | None) -> Any:
    try:
        return None if reading is None else reading()
    except Exception:  # NVML's own classes; AttributeError where pynvml is too old
        return None


class Gpus:
    """The GPUs that a run uses on this host; opened with NVML, which is closed by :meth:`close`.

    Args:
        buses: their PCI bus ids, in the order of ``cuda:N``; from :func:`bus_ids`.

    Raises:
        Exception: whatever ``pynvml`` raises where it, the driver or a GPU is missing.
    """

    def __init__(self, buses: Sequence[str]) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        handles = [self._nvml.nvmlDeviceGetHandleByPciBusId(bus.encode()) for bus in buses]
        self.all = [Gpu(self._nvml, handle, index) for index, handle in enumerate(handles)]

    def close(self) -> None:
        """Closes NVML."""
        with contextlib.suppress(Exception):
            self._nvml.nvmlShutdown()


def bus_ids(count: int | None) -> list[str]:
    """Returns the PCI bus ids of ``cuda:0`` and the following ones, as ``CUDA_VISIBLE_DEVICES`` numbers them.

    NVML numbers GPUs in another order than CUDA does, and knows nothing of that variable.

    Args:
        count: how many; None for all that this process sees.
    """
    driver, found = cuda_driver(), []
    if driver is None:
        return []
    visible = cuda_devices()
    for number in range(visible if count is None else min(count, visible)):
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(64)
        if driver.cuDeviceGet(ctypes.byref(device), number) == 0 and driver.cuDeviceGetPCIBusId(name, 64, device) == 0:
            found.append(os.fsdecode(name.value))
    return found
