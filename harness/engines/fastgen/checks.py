"""What ``engine=fastgen`` refuses before anything is loaded."""

from __future__ import annotations

from typing import cast

from harness.basics.errors import UserError
from harness.config.checks import check_counts
from harness.config.schema import Config
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners.triton.checks import interpreted
from harness.engines.shared import paged

RAGGED = (Kernels.auto, Kernels.deepspeed)  # which may be DeepSpeed's


def check(config: Config, accelerator: str) -> None:
    """Raises UserError for settings that cannot be, or not on this kind of device."""
    engine = cast(FastGenConfig, config.engine)
    paged.check(engine)
    check_counts({"engine.kv_block_size": engine.kv_block_size, "engine.draft_len": engine.draft_len})
    if accelerator != "cuda" and engine.kernels is Kernels.triton and not interpreted():
        raise UserError(
            "engine.kernels",
            "triton needs CUDA; tests/test_triton_runner.py has Triton interpret it on a CPU (TRITON_INTERPRET=1)",
            "use engine.kernels=native, torch or auto",
        )
    if accelerator != "cuda" and engine.kernels is Kernels.deepspeed:
        raise UserError(
            "engine.kernels",
            "deepspeed needs CUDA: its ragged kernels do not exist for cpu",
            "use engine.kernels=native, torch or auto",
        )
    if accelerator == "cuda" and engine.kernels is Kernels.native:
        raise UserError(
            "engine.kernels", "native computes on a CPU, and this run is on cuda", "use engine.kernels=auto"
        )
    _check_draft(engine, accelerator)
    paged.check_quantization(engine, config.model.dtype, accelerator, has=engine.kernels in RAGGED)


def _check_draft(engine: FastGenConfig, accelerator: str) -> None:
    """Raises UserError where the kernels may be such as give one id for each sequence, or give it a pass later."""
    able = (Kernels.native, Kernels.torch, *((Kernels.auto,) if accelerator != "cuda" else ()))
    if engine.draft is not None and engine.kernels not in able:
        raise UserError(
            "engine.draft",
            f"{engine.draft.value}: engine.kernels={engine.kernels.value} on {accelerator} cannot check drafts",
            "use engine.draft=null, or engine.kernels=torch",
        )
