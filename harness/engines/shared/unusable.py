"""Kernels that cannot be had on this machine, found out by loading them."""

from __future__ import annotations

from harness.basics.errors import UserError


class Unusable(UserError):
    """Kernels cannot be compiled or launched here, though nothing is wrong with the model.

    Args:
        kernels: as ``engine.kernels`` names them.
        reason: why, in a clause.
    """

    def __init__(self, kernels: str, reason: str) -> None:
        super().__init__("engine.kernels", f"{kernels}: {reason}", "use engine.kernels=torch or auto")
        self.reason = reason
