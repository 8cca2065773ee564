"""Linear layers whose bfloat16 weights are laid out once as oneDNN's matrix kernels read them.

``torch.nn.functional.linear`` hands oneDNN plain row-major weights, which its CPU kernels rearrange on every
call; for the few rows of a decode pass that costs more than the multiplication. Measured on the demo model's
layers, one core, milliseconds for all of them at 4 / 64 / 512 rows: plain 36 / 89 / 568, packed 18 / 73 / 525.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 64  # for how many rows oneDNN should choose the layout; the fastest from 1 to 512 here


class PackedLinear(nn.Module):
    """Computes what ``linear`` computes, from weights packed for oneDNN; bfloat16 on a CPU."""

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


class PackedRowParallel(nn.Module):
    """AutoTP's row-parallel layer on packed weights: each rank has some of the columns, and the products are summed.

    Args:
        linear: DeepSpeed's ``LinearAllreduce``, whose input is cut already, or ``LmHeadLinearAllreduce``, whose is not.
        cut: the part of the whole input that is this rank's; None for an input that is cut already.
    """

    def __init__(self, linear: Any, cut: slice | None) -> None:
        super().__init__()
        self.product = PackedLinear(linear, bias=False)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.group = linear.mp_group
        self.cut = cut

    def forward(self, rows: Tensor) -> Tensor:
        """Returns ``[..., out_features]``, the same on all ranks."""
        product = self.product(rows if self.cut is None else rows[..., self.cut].contiguous())
        torch.distributed.all_reduce(product, group=self.group)
        return product if self.bias is None else product.add_(self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether this build and machine have the kernels: PyTorch's compiler uses the same ones."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> int:
    """Replaces the linear layers of ``model``, AutoTP's among them, by packed ones, in place; returns how many."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            packed = _packed(child)
            if packed is not None:
                setattr(module, name, packed)
                count += 1
    return count


def _packed(linear: nn.Module) -> nn.Module | None:
    if type(linear) is nn.Linear:
        return PackedLinear(linear)
    if not type(linear).__module__.startswith("deepspeed."):
        return None
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce

    if isinstance(linear, LmHeadLinearAllreduce):
        before = sum(linear._partition_sizes[: linear.tp_index])
        return PackedRowParallel(linear, slice(before, before + linear._partition_sizes[linear.tp_index]))
    if isinstance(linear, LinearAllreduce):
        return PackedRowParallel(linear, None)
    # The subclasses (fused projections) only cut their weights in another way.
    return PackedLinear(linear) if isinstance(linear, LinearLayer) and not linear.gather_output else None
