"""Passes of decodes alone, captured once as CUDA graphs: a replay is one launch, where the pass itself is hundreds.

A graph computes a fixed number of rows; a pass takes the smallest that has room for it, and padding writes to the
cache's scratch block.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from harness.engines.fastgen.runners.triton.plan import Plan

FEW = (1, 2, 4, 8)
STEP, LATER_STEP, LATER = 16, 32, 128  # rows between two graphs, up to LATER and beyond


def buckets(most: int) -> list[int]:
    """Returns the rows of the graphs, up to ``most``, which is the last."""
    all_rows = [*FEW, *range(STEP, LATER, STEP), *range(LATER, most, LATER_STEP)]
    return [*(rows for rows in all_rows if rows < most), most]


class Again:
    """Stands for a CUDA graph where there are none: what was captured is computed again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class Graphs:
    """The graphs of one decoder.

    Args:
        work: computes a pass from what the device has been sent.
        fill: sends the device a pass of nothing but padding, of so many rows.
        most: rows of the largest.
        device: whose.
    """

    def __init__(
        self, work: Callable[[Plan], None], fill: Callable[[int], None], most: int, device: torch.device
    ) -> None:
        self.rows = buckets(most)
        self._graphs: dict[int, Any] = {}
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for rows in reversed(self.rows):  # the largest first: the others fit into its memory
            plan = padded(rows)
            if pool is None:
                self._graphs[rows] = Again(partial(work, plan))
                continue
            fill(rows)
            work(plan)  # compiles what is to be compiled, which no capture allows
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the one that watches over NCCL, may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work(plan)
            self._graphs[rows] = graph

    def fitting(self, rows: int) -> int:
        """Returns the rows of the smallest graph that has ``rows``, which is not above ``most``."""
        return self.rows[bisect.bisect_left(self.rows, rows)]

    def replay(self, rows: int) -> None:
        """Computes the pass that the device was sent, of exactly the rows of a graph."""
        self._graphs[rows].replay()


def padded(rows: int) -> Plan:
    """Returns a pass of so many decodes."""
    return Plan(tokens=rows, chunks=rows, singles=rows, tiles=0, outputs=rows)
