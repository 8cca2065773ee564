"""SiLU of the gate, times the rest."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels import OPTIONS

BLOCK = 1024


@triton.jit
def silu_and_multiply_kernel(gate_up, out, inner, BLOCK: tl.constexpr):
    """A program a row and block of columns; rounded between the two steps, as Hugging Face's LlamaMLP rounds."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < inner
    gate = tl.load(gate_up + row * 2 * inner + lane, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * inner + inner + lane, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    lit = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * inner + lane, (lit * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_and_multiply(gate_up: Tensor, out: Tensor) -> None:
    """Writes ``silu(gate) * up`` of ``gate_up``, ``[rows, 2 * inner]``, to ``out``, ``[rows, inner]``; contiguous."""
    rows, inner = out.shape
    silu_and_multiply_kernel[(rows, triton.cdiv(inner, BLOCK))](
        gate_up, out, inner, BLOCK=BLOCK, num_warps=4, **OPTIONS
    )
