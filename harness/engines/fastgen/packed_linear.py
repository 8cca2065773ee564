"""Linear layers whose bfloat16 weights are laid out once as oneDNN's matrix kernels read them.

``torch.nn.functional.linear`` hands oneDNN plain row-major weights, which its CPU kernels rearrange on every
call; for the few rows of a decode pass that costs more than the multiplication. Measured on the demo model's
layers, one core, milliseconds for all of them at 4 / 64 / 512 rows: plain 36 / 89 / 568, packed 18 / 73 / 525.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 64  # for how many rows oneDNN should choose the layout; the fastest from 1 to 512 here


class PackedLinear(nn.Module):
    """Computes what ``linear`` computes, from weights packed for oneDNN; bfloat16 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Returns ``[..., out_features]`` for ``[..., in_features]``."""
        if not rows.numel():  # a pass without a sampled token: oneDNN has no kernel for no rows
            return rows.new_empty(*rows.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether this build and machine have the kernels: PyTorch's compiler uses the same ones."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> int:
    """Replaces the linear layers of ``model`` by packed ones, in place; returns how many."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
                count += 1
    return count
