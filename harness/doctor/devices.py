"""The GPUs: which there are, whether torch can use them, and what connects them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from harness.costs.memory import gib
from harness.doctor.findings import Findings
from harness.doctor.heavy import Heavy
from harness.doctor.kernels import Machine
from harness.machine import device, gpus
from harness.machine.gpus import Gpu, Installed

AREA = "gpu"
NO_CUDA = "this torch is a build without CUDA"
GET_CUDA = "install a build of torch for CUDA (pytorch.org lists them)"
STATE = "nvidia-smi shows the state of the GPU"
LARGE = 0.05  # of a GPU's memory, taken by others, that is worth a line


def found_here(found: Findings) -> Machine:
    """Says which GPUs this process sees, or why none; returns what decides the choice of kernels."""
    seen = _seen(found)
    accelerator, unusable = device.accelerator(), None
    if accelerator == "cuda" and not seen:
        unusable = gpus.why_none()
    elif accelerator == "cuda" and device.torch_cuda_version() is None:
        unusable = NO_CUDA
    return Machine(accelerator, tuple(seen), unusable)


def _seen(found: Findings) -> list[Gpu]:
    wish = os.environ.get("DS_ACCELERATOR", "").strip().lower()
    seen, build = gpus.shown(), device.torch_cuda_version()
    if wish == "cuda" and not seen:
        found.no(AREA, f"DS_ACCELERATOR=cuda, and {gpus.why_none()}", "unset DS_ACCELERATOR to run on the CPU")
        return []
    if not seen:
        kind = f"; {NO_CUDA}" if build is None else ""
        found.note(AREA, f"none: {gpus.why_none()}{kind}; runs are on the CPU")
        return []
    known = gpus.installed(seen)
    _each(found, seen, known)
    if build is None:
        found.no(AREA, f"they are of no use: {NO_CUDA}", GET_CUDA)
    else:
        _driver(found, known, build)
    if wish == "cpu":
        found.note(AREA, "DS_ACCELERATOR=cpu: runs are on the CPU", "unset it to use the GPUs")
    _connections(found, seen, known)
    return seen


def _each(found: Findings, seen: Sequence[Gpu], known: Installed) -> None:
    for gpu in seen:
        size = "memory not told" if gpu.memory_bytes is None else gib(gpu.memory_bytes)
        capability = "not told" if gpu.capability is None else ".".join(map(str, gpu.capability))
        kind = "MIG" if gpu.bus in known.sliced else "GPU"
        identity = f", {kind}-{gpu.uuid}" if gpu.uuid else ""
        found.ok(AREA, f"cuda:{gpu.number} {gpu.name}, {size}, compute capability {capability}{identity}")
        if kind == "MIG":
            lack = "it is a slice of a GPU (MIG), and NCCL joins no slices"
            found.note(AREA, f"cuda:{gpu.number}: {lack}", "use parallel.tp=1, and one process a slice")
    if known.devices > len(seen):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "NVML shows more than CUDA does"
        found.note(AREA, f"{len(seen)} of the {known.devices} that are installed are visible: {why}")


def _driver(found: Findings, known: Installed, build: str) -> None:
    """The CUDA of torch must not be of a later major version than the driver's."""
    version, name = gpus.cuda_version(), f"driver {known.driver}".strip()
    if version is None:
        return
    runs = ".".join(map(str, version))
    if int(build.split(".")[0]) > version[0]:
        remedy = "install a newer driver, or a torch for an older CUDA"
        found.no(AREA, f"{name} runs CUDA up to {runs}, torch is built for {build}", remedy)
    else:
        found.ok(AREA, f"{name} runs CUDA up to {runs}, torch is built for {build}")


def _connections(found: Findings, seen: Sequence[Gpu], known: Installed) -> None:
    if len(seen) < 2:
        return
    reach = gpus.peers(seen)
    kinds: dict[tuple[int, int], str] = {}
    for pair, direct in reach.items():
        kinds[pair] = f"{known.links.get(pair, 'a link that NVML does not tell')}{'' if direct else ', no peer access'}"
    count = Counter(kinds.values())
    for kind, pairs in count.most_common():
        shown = f"all {pairs} pairs" if len(count) == 1 and pairs > 1 else _named(kinds, kind)
        outcome = found.note if "no peer access" in kind else found.ok
        outcome(AREA, f"{shown}: {kind}")


def _named(kinds: Mapping[tuple[int, int], str], kind: str) -> str:
    return ", ".join(f"cuda:{one}-{other}" for (one, other), its in kinds.items() if its == kind)


def computing(found: Findings, heavy: Heavy) -> list[str]:
    """Says whether torch computes on each GPU; returns what keeps a run from using them."""
    wrong = []
    for entry in heavy.devices():
        number = entry["device"]
        name = "torch" if number is None else f"cuda:{number}"
        if entry["error"] is not None:
            wrong.append(f"{name}: {entry['error']}")
            found.no(AREA, f"{name} does not compute: {entry['error']}", GET_CUDA if number is None else STATE)
            continue
        found.ok(AREA, f"{name} computes a bfloat16 product")
        taken = entry["whole"] - entry["free"]
        if taken > LARGE * entry["whole"]:
            found.note(AREA, f"{name}: {gib(taken)} of {gib(entry['whole'])} are taken", "by others, if not by this")
    return wrong
