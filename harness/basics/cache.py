"""Where what is made once is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from harness.basics.errors import UserError


def cache_root() -> Path:
    """Returns the directory that holds the demo model; it need not exist yet."""
    if root := os.environ.get("HARNESS_CACHE"):
        return Path(root).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser().absolute() / "deepspeed-llama-harness"
    except RuntimeError:
        raise UserError("HARNESS_CACHE", "not set, and this user has no home directory", "set it") from None
