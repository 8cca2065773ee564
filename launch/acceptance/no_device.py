"""What a machine without a CUDA device can be told."""

from __future__ import annotations

import os
import subprocess
import sys

from acceptance.here import ROOT
from acceptance.kernels import compiler
from harness.basics.errors import UserError
from harness.machine import snapshot
from harness.models import demo

WHEELS = "ACCEPTANCE_WHEELS"
DOCTOR_S = 120


def tell(reason: str) -> None:
    """Prints that there is no device, and what was checked without one."""
    print(f"no CUDA device: {reason}")
    print("checked without one:")
    versions = ", ".join(f"{name} {version}" for name, version in snapshot.package_versions().items())
    print(f"  packages: {versions}")
    for name in ("nvcc", "g++"):
        print(f"  {name}: {compiler(name) or 'not there'}")
    print(f"  demo model: {demo_model()}")
    if folder := os.environ.get(WHEELS):
        print(f"  {WHEELS}: the checksums of {folder} are right")  # or gpu_acceptance.sh would have ended
    print("  doctor:")
    for line in doctor()[1].splitlines():
        print(f"    {line}")
    print("--rehearse runs all stages without a GPU", flush=True)


def demo_model() -> str:
    """Returns where the demo model is, or that it is not there."""
    try:
        place = demo.cache_root() / demo.NAME
    except UserError as error:
        return str(error)
    return f"complete in {place}" if demo.complete(place) else f"not in {place}"


def doctor(*overrides: str) -> tuple[int | None, str]:
    """Runs ``python -m harness.doctor``; returns its exit status, None where there is no answer, and its lines."""
    command = [sys.executable, "-m", "harness.doctor", *overrides]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOCTOR_S
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {DOCTOR_S} s"
    return done.returncode, done.stdout + done.stderr
