"""How a run can end."""

from __future__ import annotations

from dataclasses import dataclass

STATUSES = ("ok", "failed", "oom", "timeout", "interrupted", "invalid")
RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Fault:
    """How a run ended: its ``status`` and ``error`` in ``runs.csv``, and the exit status."""

    status: str
    error: str
    exit_status: int
