"""Stage machine: what is here, and how fast it copies and multiplies. Later stages read its figures."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from acceptance import kernels, no_device
from acceptance.findings import Outcome
from acceptance.stage import Check, Stage
from harness.machine import device, snapshot

PACKAGES = ("torch", "transformers", "triton", "deepspeed", "deepspeed-mii", "deepspeed-kernels", "numpy", "accelerate")
# Elements of a buffer to copy and rows of a square product; much more than the caches of a GPU hold, and a little.
COPY = {"cuda": 2**30, "cpu": 2**24}
SQUARE = {"cuda": 8192, "cpu": 128}
TIMES = {"cuda": 20, "cpu": 5}
SUSTAINED_S = 3.0  # by then a GPU is at its limit of power, if it comes to it


def run(stage: Stage) -> None:
    """Looks at versions, card, compilers and links, measures two rates, and asks the doctor."""
    checks: tuple[tuple[str, Callable[[Stage, Check], None]], ...] = (
        ("versions", versions),
        ("card", card),
        ("compilers", compilers),
        ("peers", peers),
        ("copy", copy_rate),
        ("matrix", matrix_rate),
        ("doctor", doctor),
    )
    for name, look in checks:
        if not stage.done(name):
            with stage.check(name) as check:
                look(stage, check)


def versions(stage: Stage, check: Check) -> None:
    """Reports the packages that decide speed and results; one that is not installed is left out."""
    check.outcome = Outcome.measured
    check.figures["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            check.figures[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            check.detail += f"{package} is not installed; "
    check.figures["torch_cuda"] = device.torch_cuda_version() or "none"
    check.detail = check.detail.removesuffix("; ")


def card(stage: Stage, check: Check) -> None:
    """Reports the GPU and its driver, or the CPU."""
    import torch

    check.outcome = Outcome.measured
    check.figures |= {"name": device.device_name(stage.device), "cores": device.cores()}
    if stage.device == "cpu":
        return
    properties = torch.cuda.get_device_properties(0)
    drivers = [gpu["driver"] for gpu in snapshot.gpus()]
    check.figures |= {
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(0)[0],
        "processors": properties.multi_processor_count,
        "driver": drivers[0] if drivers else "unknown",
        "architectures_of_torch": " ".join(torch.cuda.get_arch_list()),
        "architectures_to_compile": os.environ.get("TORCH_CUDA_ARCH_LIST", "not set"),
    }
    able = torch.ones(2, device="cuda").sum().item()
    if able != 2:
        raise RuntimeError(f"1 + 1 on the GPU is {able}")
    check.outcome = Outcome.passed


def compilers(stage: Stage, check: Check) -> None:
    """Reports nvcc and g++; what needs one that is not there says so itself."""
    check.outcome = Outcome.measured
    check.figures |= {name: kernels.compiler(name) or "not there" for name in ("nvcc", "g++")}


def peers(stage: Stage, check: Check) -> None:
    """Reports between how many pairs of GPUs one reads the other's memory."""
    import torch

    count = 0 if stage.rehearse else torch.cuda.device_count()
    if count < 2:
        check.outcome, check.detail = Outcome.skipped, f"{count} GPUs"
        return
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    direct = sum(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
    check.outcome = Outcome.measured
    check.figures |= {"pairs": len(pairs), "direct_pairs": direct}


def copy_rate(stage: Stage, check: Check) -> None:
    """Measures copies within the device's memory: bytes read and written."""
    import torch

    count = COPY[stage.device]
    if stage.device == "cuda":  # 4 GiB, or what a smaller card has room for twice
        count = min(count, torch.cuda.mem_get_info(0)[0] // 16)
    source = torch.ones(count, dtype=torch.float32, device=stage.device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), stage.device)
    if target[-1].item() != 1:
        raise RuntimeError("the copy is not the original")
    check.outcome = Outcome.measured
    check.figures |= {"copy_bytes_per_s": 2 * 4 * count / seconds, "buffer_bytes": 4 * count}


def matrix_rate(stage: Stage, check: Check) -> None:
    """Measures a square bfloat16 product of random numbers: on zeros a GPU draws less power, and clocks higher."""
    import torch

    size = SQUARE[stage.device]
    left, right = (torch.randn(size, size, device=stage.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def product() -> None:
        torch.matmul(left, right, out=out)

    check.outcome = Outcome.measured
    check.figures |= {"bf16_flops": 2 * size**3 / median_s(product, stage.device), "size": size}
    if stage.device == "cuda":
        began = time.monotonic()
        while time.monotonic() - began < SUSTAINED_S:
            seconds = median_s(product, stage.device)
        check.figures["bf16_flops_sustained"] = 2 * size**3 / seconds


def median_s(call: Callable[[], Any], where: str) -> float:
    """Returns the median of a call's seconds on a device, after three that are not counted."""
    import torch

    for _ in range(3):
        call()
    if where == "cpu":
        times = []
        for _ in range(TIMES[where]):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMES[where] + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) / 1000 for one, other in itertools.pairwise(events))


def doctor(stage: Stage, check: Check) -> None:
    """Asks harness.doctor about the default config, and keeps its answer."""
    status, answer = no_device.doctor()
    (stage.folder / "doctor.txt").write_text(answer)
    print(answer, flush=True)
    lines = answer.strip().splitlines() or ["no answer"]
    if status is None:
        check.outcome, check.detail = Outcome.skipped, lines[-1]
    elif status:
        against = [line for line in lines if line.startswith("[no] config")]  # the others decide nothing
        check.outcome, check.detail = Outcome.failed, f"exit status {status}: {(against or lines[-1:])[0]}"
    check.figures["lines"] = len(lines)
