"""The stage ``deepspeed_ops``: each compiled op of DeepSpeed against its stand-in of the tests, on the same inputs.

Where they agree, what the tests show of DeepSpeed's engine with the stand-ins on a CPU is true of the kernels too. In a
rehearsal the stand-ins are judged alone, by float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import interpreter

from acceptance import built
from acceptance.findings import Outcome
from acceptance.stage import Stage
from harness.engines.shared import deepspeed_ops, ragged_kernels

BUILD = "compiled kernels"


def run(stage: Stage) -> None:
    """Reports a finding an op, size and type."""
    interpreter.interpret()  # DeepSpeed imports Triton, and so do the inputs
    from support import op_batches, op_cases
    from support.deepspeed_kernels import Kernels

    kernels = Kernels if stage.rehearse else _compiled(stage, op_cases.Compiled)
    if kernels is None:
        return
    fp6 = not stage.rehearse and torch.cuda.get_device_capability()[0] == 8
    if not fp6 and not stage.done("FP6"):
        stage.report("FP6", Outcome.skipped, "its kernels are for compute capability 8.x")
    for sizes in (op_batches.TINY,) if stage.rehearse else op_batches.LLAMA:
        for dtype in (torch.float16, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            cases = op_cases.cases(sizes, dtype, stage.device, fp6 and dtype is torch.float16)
            for op, make in cases.items():
                name = f"{op}, {sizes.name} {kind}"
                if stage.done(name):
                    continue
                with stage.check(name) as found:
                    shares = make().check(kernels, stage.device)
                    found.figures |= (
                        {"stand_in_from_exact": shares["stand_in_from_exact"]} if stage.rehearse else shares
                    )
                    found.detail = "largest distance as a share of its bound"


def _compiled(stage: Stage, load: Callable[[], Any]) -> Any:
    """Returns the compiled ops, as one object; None, and says why, where they cannot be had."""
    major = torch.cuda.get_device_capability()[0]
    reason = ragged_kernels.not_installed() or ragged_kernels.device_unsupported(None, major) or built.missing(stage)
    if reason is not None:
        stage.report(BUILD, Outcome.refused, reason)
        return None
    try:
        kernels = load()
    except deepspeed_ops.OpsError as error:
        stage.report(BUILD, Outcome.failed, str(error))
        return None
    stage.report(BUILD, Outcome.passed, "built and loaded")
    return kernels
