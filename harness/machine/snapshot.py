"""What the run ran on: accelerator, CPU, memory, package versions, git commit.

Nothing here imports torch, transformers or deepspeed, so that a launcher can ask before the ranks start.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from harness.basics.places import CHECKOUT, ROOT
from harness.machine.device import CPU_FLAGS, cores, cpu_flags, cpuinfo, cuda_devices, cuda_driver, device_name

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
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HARNESS_CPU_ISA",
    "HARNESS_NUMA_ROOT",
    "HF_HUB_OFFLINE",
    "TORCH_CUDA_ARCH_LIST",
    "LD_PRELOAD",
    "MALLOC_CONF",
)


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


def code_state() -> dict[str, Any] | None:
    """Returns :func:`git_state` of this checkout, or what it was of the one that this package was built from."""
    if CHECKOUT:
        return git_state(ROOT)
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((ROOT / "harness" / "built.json").read_bytes())
        return found if isinstance(found, dict) else None
    return None


def code_fingerprint() -> str:
    """Returns the SHA-256 of the harness's own source, committed or not; documentation and data do not count."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
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
        "git": code_state(),
        "device": device,
        "device_name": device_name(device),
        "cpu": {
            "model": cpuinfo("model name") or platform.processor(),
            "cores_visible": cores(),
            "cores_total": os.cpu_count(),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "env": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "load_average": load,
    }
