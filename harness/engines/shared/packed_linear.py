"""Linear layers as a CPU multiplies them fastest.

``torch.nn.functional.linear`` hands oneDNN plain row-major weights, which its CPU kernels rearrange on every
call; for the few rows of a decode pass that costs more than the multiplication. Laid out once as these read them,
measured on the demo model's layers, one core, milliseconds for all of them at 4 / 64 / 512 rows: plain
36 / 89 / 568, packed 18 / 73 / 525.

Where the processor has neither AVX-512 nor instructions for bfloat16, oneDNN multiplies one value after another. Made
float32 piece by piece, in cache, 11,008 x 4,096 weights take, one core, milliseconds at 4 / 16 / 64 rows: plain
40 / 142 / 569, so 30 / 44 / 95.

Of float32 weights only those as wide as a vocabulary are packed: 49,152 x 576 of them take, one core, milliseconds at
1 / 4 / 16 / 64 / 512 rows: plain 17 / 32 / 53 / 103 / 503, packed 15 / 17 / 29 / 62 / 452. Narrow ones gain nothing,
and lose at one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.machine.device import has_bfloat16_kernels

ROWS = 64  # for how many rows oneDNN should choose the layout; the fastest from 1 to 512 here
FEW_ROWS = 8  # below, oneDNN's own products of bfloat16 are as fast on two cores as those of float32
WIDE = 16_384  # outputs from which weights of float32 are packed
PIECE_BYTES = 2**21  # of float32 weights at a time: from 1 to 4 MiB makes no difference, 16 take twice as long


class PackedLinear(nn.Module):
    """Computes what ``linear`` computes, from weights packed for oneDNN; on a CPU."""

    def __init__(self, linear: Any, bias: bool = True) -> None:
        super().__init__()
        self.out_features = linear.weight.shape[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None or not bias else linear.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Returns ``[..., out_features]`` for ``[..., in_features]``."""
        if not rows.numel():  # a pass without a sampled token: oneDNN has no kernel for no rows
            return rows.new_empty(*rows.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")


class WidenedLinear(nn.Module):
    """Computes what ``linear`` computes in float32, rounded once, from bfloat16 weights that stay so; on a CPU."""

    def __init__(self, linear: Any, bias: bool = True) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None or not bias else linear.bias.detach()
        self.step = max(16, PIECE_BYTES // (4 * self.weight.shape[1]) // 16 * 16)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns ``[..., out_features]`` for ``[..., in_features]``."""
        weight, bias = self.weight, self.bias
        if rows.numel() < FEW_ROWS * weight.shape[1]:
            return nn.functional.linear(rows, weight, bias)
        wide = rows.float()
        product = rows.new_empty(*rows.shape[:-1], weight.shape[0])
        for start in range(0, weight.shape[0], self.step):
            piece = slice(start, start + self.step)
            some = None if bias is None else bias[piece].float()
            product[..., piece] = nn.functional.linear(wide, weight[piece].float(), some)
        return product


class PackedRowParallel(nn.Module):
    """AutoTP's row-parallel layer on such weights: each rank has some of the columns, and the products are summed.

    Args:
        linear: DeepSpeed's ``LinearAllreduce``, whose input is cut already, or ``LmHeadLinearAllreduce``, whose is not.
        cut: the part of the whole input that is this rank's; None for an input that is cut already.
    """

    def __init__(self, linear: Any, cut: slice | None) -> None:
        super().__init__()
        self.product = _whole(linear, bias=False)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.group = linear.mp_group
        self.cut = cut

    def forward(self, rows: Tensor) -> Tensor:
        """Returns ``[..., out_features]``, the same on all ranks."""
        product = self.product(rows if self.cut is None else rows[..., self.cut].contiguous())
        torch.distributed.all_reduce(product, group=self.group)
        return product if self.bias is None else product.add_(self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether :func:`pack_linears` is for such a model."""
    if device.type != "cpu":
        return False
    return dtype is torch.bfloat16 or (dtype is torch.float32 and torch.backends.mkldnn.is_available())


def pack_linears(model: nn.Module) -> int:
    """Replaces the linear layers of ``model``, AutoTP's among them, by faster ones, in place; returns how many."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            packed = _packed(child)
            if packed is not None:
                setattr(module, name, packed)
                count += 1
    return count


def _whole(linear: Any, bias: bool = True) -> PackedLinear | WidenedLinear:
    widened = linear.weight.dtype is torch.bfloat16 and not has_bfloat16_kernels()
    return (WidenedLinear if widened else PackedLinear)(linear, bias)


def _packed(linear: Any) -> nn.Module | None:
    ours = type(linear) is nn.Linear
    if not ours and not type(linear).__module__.startswith("deepspeed."):
        return None
    weight = getattr(linear, "weight", None)
    if weight is None or (weight.dtype is torch.float32 and weight.shape[0] < WIDE):
        return None
    if ours:
        return _whole(linear)
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce

    if isinstance(linear, LmHeadLinearAllreduce):
        before = sum(linear._partition_sizes[: linear.tp_index])
        return PackedRowParallel(linear, slice(before, before + linear._partition_sizes[linear.tp_index]))
    if isinstance(linear, LinearAllreduce):
        return PackedRowParallel(linear, None)
    # The subclasses (fused projections) only cut their weights in another way.
    return _whole(linear) if isinstance(linear, LinearLayer) and not linear.gather_output else None
