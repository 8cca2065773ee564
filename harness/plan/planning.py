"""Not built yet."""

from __future__ import annotations

import argparse

from omegaconf import DictConfig

from harness.basics.errors import UserError


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Returns the exit status."""
    raise UserError("plan", "is not built yet", "leave it out")
