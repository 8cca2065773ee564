"""The GPUs that the CUDA driver shows this process and what connects them; no context is made on any of them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from harness.machine.device import cuda_devices, cuda_driver

CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
ANCESTORS = {  # NVML_TOPOLOGY_*: where the paths of two GPUs meet
    0: "on one board",
    10: "under one PCIe switch",
    20: "under several PCIe switches",
    30: "under one PCIe host bridge",
    40: "in one NUMA node",
    50: "across NUMA nodes",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as CUDA numbers it.

    Attributes:
        number: N of ``cuda:N``.
        memory_bytes, capability: None where the driver does not tell.
        uuid: without its prefix ``GPU-`` or ``MIG-``; empty where the driver does not tell.
        bus: PCI bus id, which NVML knows it by.
    """

    number: int
    name: str
    memory_bytes: int | None
    capability: tuple[int, int] | None
    uuid: str
    bus: str


@dataclass(slots=True)
class Installed:
    """What NVML knows of the host, whatever ``CUDA_VISIBLE_DEVICES`` hides.

    Attributes:
        driver: its version; empty where NVML does not tell.
        devices: GPUs that are installed.
        sliced: bus ids of those that are cut into MIG slices.
        links: by two numbers of :class:`Gpu`, what connects them, in a clause.
    """

    driver: str = ""
    devices: int = 0
    sliced: set[str] = field(default_factory=set)
    links: dict[tuple[int, int], str] = field(default_factory=dict)


def shown() -> list[Gpu]:
    """Returns the devices that this process sees."""
    driver = cuda_driver()
    return [] if driver is None else [_gpu(driver, number) for number in range(cuda_devices())]


def cuda_version() -> tuple[int, int] | None:
    """Returns the newest CUDA that the driver runs, (major, minor); None without a driver."""
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.c_int(0)
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return None


def why_none() -> str:
    """Returns, in a clause, why the CUDA driver shows no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        cards = any(Path("/dev").glob("nvidia[0-9]*"))
        return "there is no CUDA driver (libcuda.so.1)" + (", though there are /dev/nvidia files" if cards else "")
    if (status := driver.cuInit(0)) not in (0, 100):  # 100: no device
        said = ctypes.c_char_p()
        with contextlib.suppress(AttributeError):
            driver.cuGetErrorString(status, ctypes.byref(said))
        return f"the CUDA driver does not start: error {status} ({(said.value or b'unknown').decode(errors='replace')})"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "the CUDA driver shows no device" + (f", CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "")


def installed(gpus: Sequence[Gpu]) -> Installed:
    """Returns what NVML tells; what it does not is left as it is."""
    found = Installed()
    with contextlib.suppress(Exception):  # pynvml is missing or too old, or raises classes of its own
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            _ask(nvml, gpus, found)
        finally:
            nvml.nvmlShutdown()
    return found


def peers(gpus: Sequence[Gpu]) -> dict[tuple[int, int], bool]:
    """Returns, by two numbers, whether each of the two devices reaches the other's memory directly."""
    driver, found = cuda_driver(), {}
    if driver is None:
        return {}
    for one, other in combinations([gpu.number for gpu in gpus], 2):
        both = []
        for here, there in ((one, other), (other, one)):
            reaches = ctypes.c_int(0)
            done = driver.cuDeviceCanAccessPeer(ctypes.byref(reaches), _handle(driver, here), _handle(driver, there))
            both.append(done == 0 and bool(reaches.value))
        found[one, other] = all(both)
    return found


def _ask(nvml: Any, gpus: Sequence[Gpu], found: Installed) -> None:
    found.devices = nvml.nvmlDeviceGetCount()
    driver = nvml.nvmlSystemGetDriverVersion()
    found.driver = driver.decode(errors="replace") if isinstance(driver, bytes) else driver
    handles = {}
    for gpu in gpus:
        handle = handles[gpu.number] = nvml.nvmlDeviceGetHandleByPciBusId(gpu.bus.encode())
        with contextlib.suppress(Exception):  # a GPU that cannot be sliced
            if nvml.nvmlDeviceGetMigMode(handle)[0] == 1:
                found.sliced.add(gpu.bus)
    for one, other in combinations(handles, 2):
        with contextlib.suppress(Exception):
            ancestor = nvml.nvmlDeviceGetTopologyCommonAncestor(handles[one], handles[other])
            found.links[one, other] = f"PCIe, {ANCESTORS.get(ancestor, 'unknown')}"
        with contextlib.suppress(Exception):
            if nvml.nvmlDeviceGetP2PStatus(handles[one], handles[other], NVLINK) == nvml.NVML_P2P_STATUS_OK:
                found.links[one, other] = "NVLink"


def _gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device = _handle(driver, number)
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
    driver.cuDeviceGetName(name, 255, device)
    driver.cuDeviceGetPCIBusId(bus, 63, device)
    size = ctypes.c_size_t(0)
    known = driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
    capability = []
    for attribute in CAPABILITY:
        value = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0:
            capability.append(value.value)
    identity = ctypes.create_string_buffer(16)
    told = False
    with contextlib.suppress(AttributeError):  # a driver before CUDA 11.4, which knows no slices
        told = driver.cuDeviceGetUuid_v2(identity, device) == 0
    return Gpu(
        number,
        name.value.decode(errors="replace"),
        size.value if known else None,
        (capability[0], capability[1]) if len(capability) == 2 else None,
        str(uuid.UUID(bytes=identity.raw)) if told else "",
        os.fsdecode(bus.value),
    )


def _handle(driver: ctypes.CDLL, number: int) -> int:
    device = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    return device.value
