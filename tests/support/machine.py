"""What this machine can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.known_model import KnownModel

EVERY_FLAG = {flag for flags in native_checks.INSTRUCTION_SETS.values() for flag in flags}  # of the native kernels
needs_native = pytest.mark.skipif(native_checks.processor_lacks() is not None, reason="this processor has no AVX2")


def kernels_on_cpu(model: Path, dtype: str) -> str:
    """Returns what ``engine.kernels=auto`` takes on this machine for the checkpoint in ``model``."""
    architecture = json.loads((model / "config.json").read_text())
    reason = native_checks.unsupported(KnownModel(architecture, dtype))
    return "native" if reason is None else "torch"


def skip_unless_deepspeed_takes(dtype: str) -> None:
    """Skips float16 where DeepSpeed does not compute it: on a CPU without instructions for it."""
    from deepspeed.accelerator import get_accelerator

    if dtype == "float16" and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed takes no float16 on this processor")
