"""What this machine can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.known_model import KnownModel
from harness.machine.device import cpu_flags

needs_native = pytest.mark.skipif(
    not cpu_flags().issuperset(native_checks.INSTRUCTIONS), reason="this processor has no AVX-512"
)
needs_native_bfloat16 = pytest.mark.skipif(
    not cpu_flags().issuperset((*native_checks.INSTRUCTIONS, native_checks.BFLOAT16)),
    reason="this processor has no AVX512-BF16",
)


def kernels_on_cpu(model: Path, dtype: str) -> str:
    """Returns what ``engine.kernels=auto`` takes on this machine for the checkpoint in ``model``."""
    architecture = json.loads((model / "config.json").read_text())
    reason = native_checks.unsupported(KnownModel(architecture, dtype)) or native_checks.slower(dtype)
    return "native" if reason is None else "torch"


def skip_unless_deepspeed_takes(dtype: str) -> None:
    """Skips float16 where DeepSpeed does not compute it: on a CPU without instructions for it."""
    from deepspeed.accelerator import get_accelerator

    if dtype == "float16" and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed takes no float16 on this processor")
