"""``engine.order``: in which order requests enter an engine, and how many a replica takes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from harness.workload.records import Request


class Order(Enum):
    """The dataset's order, or the longest ``output_len`` first."""

    dataset = "dataset"
    longest_first = "longest_first"


def arranged(requests: Sequence[Request], order: Order) -> list[Request]:
    """Returns the requests as ``engine.order`` says; equal lengths keep the dataset's order."""
    if order is Order.dataset:
        return list(requests)
    return sorted(requests, key=lambda request: -(request.output_len or 0))


def lookahead(replicas: int) -> int:
    """Returns how many requests a replica takes at a time, and at least has at hand before they can start.

    What one replica has taken, no other can: only a lone one may take many at a time. How many more it takes where
    these few would not fill its passes, ``Scheduler.hungry`` says.
    """
    return 256 if replicas == 1 else 4
