"""Residual sum and RMSNorm in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels import OPTIONS


@triton.jit
def add_rms_norm_kernel(
    added, residual, weight, out, columns, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row; rounded where Hugging Face's LlamaRMSNorm rounds."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    at = row * columns + lane
    total = tl.load(residual + at, mask=inside, other=0.0)
    kind = total.dtype
    if ADDS:
        more = tl.load(added + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + more.to(tl.float32)).to(kind)
        tl.store(residual + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    normed = (wide * scale).to(kind).to(tl.float32)
    factor = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * factor).to(kind), mask=inside)


def add_rms_norm(added: Tensor | None, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """Adds ``added`` to ``residual`` in place and writes its norm to ``out``; all ``[rows, hidden]``, contiguous.

    Args:
        added: what the layer before gave; None leaves ``residual`` as it is.
        weight: ``[hidden]``.
    """
    rows, columns = residual.shape
    block = triton.next_power_of_2(columns)
    add_rms_norm_kernel[(rows,)](
        residual if added is None else added,
        residual,
        weight,
        out,
        columns,
        epsilon,
        ADDS=added is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **OPTIONS,
    )
