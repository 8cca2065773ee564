"""What computes here: CPU or GPU, and what it can do."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def accelerator() -> str:
    """Returns ``"cpu"`` or ``"cuda"``: what the ranks will run on.

    ``DS_ACCELERATOR`` decides when it names one of the two; otherwise CUDA needs a CUDA build of torch and a
    driver that shows at least one device.
    """
    wish = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    if wish in ("cpu", "cuda"):
        return wish
    return "cuda" if torch_cuda_version() is not None and cuda_driver() is not None else "cpu"


def torch_cuda_version() -> str | None:
    """Returns the CUDA version torch was built for, None for a CPU build or without torch.

    Read from the text of ``torch/version.py``: importing torch takes seconds.
    """
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return _cuda_version_in(Path(spec.origin).with_name("version.py"))


def _cuda_version_in(version_file: Path) -> str | None:
    try:
        text = version_file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    match = re.search(r"^cuda\s*(?::[^=\n]*)?=\s*(.+?)\s*$", text, re.MULTILINE)
    if match is None:
        return None
    try:
        value = ast.literal_eval(match.group(1))
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, str) and value else None


def cuda_driver() -> ctypes.CDLL | None:
    """Returns the initialised CUDA driver library when it shows at least one device (no context is made)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
            return None
    except (OSError, AttributeError):
        return None
    return driver


def cuda_devices() -> int:
    """Returns how many devices the CUDA driver shows this process, which ``CUDA_VISIBLE_DEVICES`` narrows."""
    driver, count = cuda_driver(), ctypes.c_int(0)
    if driver is not None:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def compute_capabilities() -> list[str]:
    """Returns the compute capabilities of this host's GPUs, each once, such as ``["8.0", "9.0"]``.

    Those that ``CUDA_VISIBLE_DEVICES`` hides are among them; none where NVML does not tell.
    """
    found = set()
    with contextlib.suppress(Exception):  # pynvml is missing or too old, or raises classes of its own
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                found.add(tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)))
        finally:
            nvml.nvmlShutdown()
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def supports_bfloat16_on_cpu() -> bool:
    """Returns whether the CPU multiplies bfloat16 in hardware; False where /proc/cpuinfo is missing."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def has_bfloat16_kernels() -> bool:
    """Returns whether oneDNN has matrix kernels for bfloat16 here, as PyTorch's compiler asks it; imports torch."""
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpuinfo(key: str) -> str:
    """Returns the first value of ``key`` in /proc/cpuinfo, empty when there is none."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def cpu_flags() -> set[str]:
    """Returns the instructions that /proc/cpuinfo names; none where it is missing."""
    return set(cpuinfo("flags").split())


def cores() -> int:
    """Returns the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: str) -> str:
    """Returns the GPU's name for ``"cuda"``, the CPU's model name otherwise; empty when it cannot be told."""
    if device == "cuda":
        driver = cuda_driver()
        handle, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        if driver is None or driver.cuDeviceGet(ctypes.byref(handle), 0) != 0:
            return ""
        return name.value.decode(errors="replace") if driver.cuDeviceGetName(name, 255, handle) == 0 else ""
    return cpuinfo("model name") or platform.processor() or platform.machine()
