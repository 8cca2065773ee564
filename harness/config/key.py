"""A key of ``conf/``: its default and what is said of it, in ``--help``, in the reference and in errors."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def key(default: Any, meaning: str, *, unit: str = "", allowed: str = "") -> Any:
    """Returns a dataclass field.

    Args:
        default: its value; of a list or a dict every config gets its own.
        meaning: one line, without a full stop.
        unit: such as ``tokens``, ``bytes/s``, ``seconds``; empty for none.
        allowed: what may be given, where the type does not say it.
    """
    metadata = {"meaning": meaning, "unit": unit, "allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
