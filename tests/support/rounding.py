"""How far rounding may take a number from the exact one, and whether it did not go further."""

from __future__ import annotations

import torch
from torch import Tensor

SINGLE = 2.0**-24  # what rounding to float32 changes a number by at most, as a share of it


def unit(dtype: torch.dtype) -> float:
    """Returns by which share rounding to the type changes a number at most."""
    return torch.finfo(dtype).eps / 2


def tiny(dtype: torch.dtype) -> float:
    """Returns what roundings add at most to a number below the type's normal ones, times any factor here."""
    return 16 * torch.finfo(dtype).smallest_normal * unit(dtype)


def near(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """Returns the largest distance as a share of its own bound; both sides may be on any device.

    Raises:
        AssertionError: a number is off by more than its bound, or is no number.
    """
    expected, bound = (one.double().to(got.device) for one in (expected, bound))
    share = (got.double() - expected).abs() / bound
    wrong = ~(share <= 1) & (got.double() != expected)  # a bound of 0 lets nothing through but the number itself
    if wrong.any():
        most = float(share[wrong].nan_to_num(float("inf"), posinf=float("inf")).max())
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {most:.3g} of its bounds")
    return float(share.nan_to_num(0.0).max())  # 0 / 0: the number itself
