"""What the run ran on: accelerator, CPU, memory, package versions, git commit.

Nothing here imports torch, transformers or deepspeed, so that a launcher can ask before the ranks start.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "deepspeed-mii",
    "deepspeed-kernels",
    "accelerate",
    "hydra-core",
    "omegaconf",
    "tokenizers",
    "safetensors",
    "numpy",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
VARIABLES = (
    "OMP_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HUB_OFFLINE",
    "TORCH_CUDA_ARCH_LIST",
    "LD_PRELOAD",
    "MALLOC_CONF",
)


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


def device_memory_bytes() -> int | None:
    """Returns the memory (bytes) of the smallest GPU that this process sees; None where nobody can tell."""
    sizes = []
    if (driver := cuda_driver()) is not None:  # asked first: it knows CUDA_VISIBLE_DEVICES and slices of a GPU
        for number in range(cuda_devices()):
            handle, size = ctypes.c_int(0), ctypes.c_size_t(0)
            known = driver.cuDeviceGet(ctypes.byref(handle), number) == 0
            if known and driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle) == 0:
                sizes.append(size.value)
    return min(sizes or [gpu["memory_bytes"] for gpu in gpus()], default=None)


def supports_bfloat16_on_cpu() -> bool:
    """Returns whether the CPU multiplies bfloat16 in hardware; False where /proc/cpuinfo is missing."""
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def _cpuinfo(key: str) -> str:
    """Returns the first value of ``key`` in /proc/cpuinfo, empty when there is none."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def cpu_flags() -> set[str]:
    """Returns the instructions that /proc/cpuinfo names; none where it is missing."""
    return set(_cpuinfo("flags").split())


def cores() -> int:
    """Returns the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Returns the host memory (bytes) that can still be taken, container limits included."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError):
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        headroom = cgroup_headroom(membership, Path("/sys/fs/cgroup"))
        if headroom is not None:
            available = min(available, headroom)
    return available


def cgroup_headroom(membership: str, mount: Path) -> int | None:
    """Returns the bytes left under the tightest memory limit of this process's control groups.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        mount: where the control groups are mounted, ``/sys/fs/cgroup``.

    Returns:
        Limit less usage, the reclaimable file cache not counted as usage; None when no limit is in force.
    """
    tightest: int | None = None
    for line in membership.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            root, limits = mount, ["memory.max", "memory.high"]
            usage, cache = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limits = mount / "memory", ["memory.limit_in_bytes"]
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container often sees its own group mounted as the root, and not the path it has on the host.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for depth in range(len(parts), -1, -1):
            group = root.joinpath(*parts[:depth])
            bounds = [bound for name in limits if (bound := _read_int(group / name)) is not None]
            used = _read_int(group / usage)
            # Version 1 writes "no limit" as the largest page-aligned signed 64-bit number.
            if not bounds or used is None or min(bounds) >= 2**62:
                continue
            left = max(0, min(bounds) - max(0, used - _stat_value(group / "memory.stat", cache)))
            tightest = left if tightest is None else min(tightest, left)
    return tightest


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: "max"
        return None


def _stat_value(path: Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def peak_memory_bytes(device: str) -> int:
    """Returns the most memory (bytes) this process has held.

    On the host that is resident memory; on ``"cuda"`` or ``"cuda:N"`` what torch allocated on the device, 0 when
    torch is not loaded.
    """
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")
        return int(torch.cuda.max_memory_allocated(device)) if torch is not None else 0
    # On Linux ru_maxrss starts at the size of the process that launched this one, VmHWM does not.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: str) -> None:
    """Has :func:`peak_memory_bytes` begin anew with what is held now, as far as the system allows it."""
    if device.startswith("cuda"):
        if (torch := sys.modules.get("torch")) is not None:
            torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): resets VmHWM


def device_name(device: str) -> str:
    """Returns the GPU's name for ``"cuda"``, the CPU's model name otherwise; empty when it cannot be told."""
    if device == "cuda":
        driver = cuda_driver()
        handle, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        if driver is None or driver.cuDeviceGet(ctypes.byref(handle), 0) != 0:
            return ""
        return name.value.decode(errors="replace") if driver.cuDeviceGetName(name, 255, handle) == 0 else ""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that decide speed and results; absent ones left out."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            if version:
                found[package] = version
    return found


def git_state(directory: str | Path) -> dict[str, Any] | None:
    """Returns ``{"commit": str, "dirty": bool}`` of the checkout that tracks the harness in ``directory``.

    None when there is no git, no commit or no checkout, or when git refuses the directory. ``dirty`` means
    that a tracked file differs from the commit.
    """
    # A checkout named by the caller's environment (in a git hook, say) is not the one that holds the harness.
    redirects = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
    environment = {name: value for name, value in os.environ.items() if name not in redirects}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments],
                cwd=directory,
                env=environment | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=20,
                text=True,
                errors="replace",
                check=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return done.stdout

    # Installed into an environment inside someone else's checkout, the harness has no commit of its own.
    if git("ls-files", "--error-unmatch", "harness/__init__.py") is None:
        return None
    commit = git("rev-parse", "--verify", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def code_fingerprint() -> str:
    """Returns the SHA-256 of the harness's own source, committed or not; documentation and data do not count."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".h", ".cpp")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def gpus() -> list[dict[str, Any]]:
    """Returns name, memory (bytes) and driver of every GPU NVML shows; empty without NVML."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except Exception:  # any failure of an optional package
        return []
    found = []
    try:
        pynvml.nvmlInit()
        try:
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found.append(
                    {
                        "name": _text(pynvml.nvmlDeviceGetName(handle)),
                        "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                        "driver": driver,
                    }
                )
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML raises its own classes, and what a GPU slice withholds differs by driver
        return found
    return found


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def snapshot(device: str) -> dict[str, Any]:
    """Returns what a reader needs to repeat or judge a run, ready for JSON; a missing source leaves a gap."""
    try:
        load = list(os.getloadavg())
    except (OSError, AttributeError):
        load = []
    flags = cpu_flags()
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": git_state(Path(__file__).resolve().parent.parent),
        "device": device,
        "device_name": device_name(device),
        "cpu": {
            "model": _cpuinfo("model name") or platform.processor(),
            "cores_visible": cores(),
            "cores_total": os.cpu_count(),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "env": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "load_average": load,
    }
