"""The machine and the code as the driver sees them, without torch, and the environment that its stages get."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.machine import device, gpus, snapshot

ROOT = Path(__file__).resolve().parents[2]
OLDEST = 8.0  # what DeepSpeed's kernels are compiled for at least


@dataclass(frozen=True)
class Here:
    """What stands at the head of the table.

    Attributes:
        card: the GPU's name, ``CPU`` in a rehearsal.
        driver: its version, empty in a rehearsal or where NVML does not tell.
        commit: of the checkout, a fingerprint of the harness's source where there is no git.
    """

    card: str
    gpus: int
    driver: str
    torch: str
    commit: str

    def line(self) -> str:
        """Returns it as the head of the table."""
        card = f"{self.gpus} x {self.card}" if self.gpus > 1 else self.card
        driver = f", driver {self.driver}" if self.driver else ""
        return f"{card}{driver}, torch {self.torch or 'not installed'}, commit {self.commit}"


def look(rehearse: bool) -> Here:
    """Returns what is here."""
    torch, commit = snapshot.package_versions().get("torch", ""), _commit()
    if rehearse:
        return Here("CPU", 0, "", torch, commit)
    drivers = [gpu["driver"] for gpu in snapshot.gpus()]
    return Here(device.device_name("cuda"), device.cuda_devices(), (drivers or [""])[0], torch, commit)


def _commit() -> str:
    state = snapshot.git_state(ROOT)
    if state is None:
        return f"of source {snapshot.code_fingerprint()[:12]}"
    return state["commit"][:12] + (" (changed since)" if state["dirty"] else "")


def no_cuda() -> str | None:
    """Returns why there is no CUDA device for torch here, None where there is one."""
    torch = snapshot.package_versions().get("torch")
    if torch is None:
        return "torch is not installed"
    if device.torch_cuda_version() is None:
        return f"torch {torch} is a build without CUDA"
    return None if device.cuda_driver() is not None else gpus.why_none()


def capabilities() -> list[str]:
    """Returns the compute capabilities of the GPUs that this process sees, each once, such as ``["9.0"]``."""
    found = {gpu.capability for gpu in gpus.shown() if gpu.capability is not None}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def environment(rehearse: bool, kernels: Path) -> dict[str, str]:
    """Returns the variables of a stage's process.

    Args:
        kernels: where compiled extensions are kept, so that they can be carried to the next machine.
    """
    found = dict(os.environ) | {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu" if rehearse else "cuda",
    }
    if rehearse:
        return found
    found |= {"TORCH_EXTENSIONS_DIR": str(kernels / "extensions"), "TRITON_CACHE_DIR": str(kernels / "triton")}
    found.pop("TRITON_INTERPRET", None)
    able = [capability for capability in capabilities() if float(capability) >= OLDEST]
    if able:
        found.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(able))
    return found
