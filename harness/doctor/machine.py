"""The processor, the memory, and what compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil

from harness.basics.errors import one_line
from harness.config.schema import DType
from harness.costs.memory import gib
from harness.doctor.findings import Findings
from harness.engines.fastgen.runners.native import build
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.shared import ragged_kernels
from harness.machine import cgroups, device, numa
from harness.machine.device import CPU_FLAGS
from harness.machine.memory import available_memory_bytes
from harness.running import job as jobs

LIMIT_S = 20


def cpu(found: Findings) -> None:
    """Says what the processor is and what it computes with."""
    cores, whole = device.cores(), os.cpu_count() or 1
    flags = [flag for flag in CPU_FLAGS if flag in device.cpu_flags()] or ["no vector instructions that are known"]
    nodes = numa.nodes()
    on = f" on {len(nodes)} NUMA nodes" if len(nodes) > 1 else ""
    found.ok("cpu", f"{device.device_name('cpu')}, {cores} of {whole} cores may be used{on}; {', '.join(flags)}")
    dtype = jobs.resolve_dtype(DType.auto, "cpu")
    multiplies = "multiplies" if device.supports_bfloat16_on_cpu() else "does not multiply"
    found.note("cpu", f"model.dtype=auto is {dtype} on it, which {multiplies} bfloat16 in hardware")
    if (lacks := native_checks.processor_lacks()) is not None:
        found.note("cpu", f"no native kernels: {lacks}", "PyTorch's compute in their place, some times slower")
    available, free = psutil.virtual_memory(), available_memory_bytes()
    limit = cgroups.headroom(cgroups.membership())
    within = "" if limit is None or limit > free else ", which is what its control group leaves"
    found.ok("memory", f"{gib(free)} of {gib(available.total)} are free{within}")


def compilers(found: Findings) -> None:
    """Says which compilers there are, and whether they do."""
    _cxx(found)
    _nvcc(found)


def _cxx(found: Findings) -> None:
    wish = (os.environ.get("CXX") or "g++").split()[0]
    try:
        compiled = build.ready()
    except build.BuildError as error:
        found.no("compiler", str(error), "install g++ 11 or newer, or do without: engine.kernels=torch")
        return
    state = "compiled" if compiled else "compiled in seconds when first used"
    found.ok("compiler", f"{_version(shutil.which(wish))}; the native kernels are {state}")


def _nvcc(found: Findings) -> None:
    built_for, program = device.torch_cuda_version(), nvcc()
    if program is None:
        if device.accelerator() == "cuda":
            found.no("compiler", f"nvcc: {ragged_kernels.no_compiler()}", "install the CUDA toolkit, or set CUDA_HOME")
        else:
            found.note("compiler", "no nvcc, and nothing here to compile with it")
        return
    release = re.search(r"release (\d+)\.(\d+)", _run(program))
    if release is None:
        found.no("compiler", f"{program} does not say its version", "set CUDA_HOME to a whole CUDA toolkit")
        return
    version = f"nvcc {release[1]}.{release[2]} ({program})"
    if built_for is None:
        found.note("compiler", f"{version}; torch is a build without CUDA, which has no use for it")
    elif built_for.split(".")[:2] == [release[1], release[2]]:
        found.ok("compiler", f"{version}, torch is built for CUDA {built_for}")
    else:  # DeepSpeed takes another minor version of CUDA 11 and 12; extensions says what it thinks of this one
        other = found.note if built_for.split(".")[0] == release[1] else found.no
        remedy = f"set CUDA_HOME to a toolkit of CUDA {built_for}"
        other("compiler", f"{version}, and torch is built for CUDA {built_for}", remedy)
    if (lacks := ragged_kernels.no_compiler()) is not None:
        found.no("compiler", f"DeepSpeed's kernels: {lacks}", "install it")


def nvcc() -> str | None:
    """Returns the nvcc that torch's builder takes; None without one."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and os.access(Path(home, "bin/nvcc"), os.X_OK):
            return str(Path(home, "bin/nvcc"))
    usual = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (usual if os.access(usual, os.X_OK) else None)


def _version(program: str | None) -> str:
    """Returns the first line that a compiler says of itself."""
    return one_line(next(iter(_run(program).splitlines()), "") if program else "", 120)


def _run(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
