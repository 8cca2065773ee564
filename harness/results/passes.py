"""Figures over the passes of a run."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from harness.basics.files import numbered_lines
from harness.results.completions import percentile
from harness.workload.records import PASS_COLUMNS


def pass_figures(path: Path) -> dict[str, Any] | None:
    """Returns how many forward passes a ``passes.csv`` has, how long they took and how full they were.

    Read at a run's end, since nothing is to be counted within the clock. None where there are no passes; lines
    that are none (a torn last one) are passed over.
    """
    seconds, tokens = array("d"), array("d")
    places = PASS_COLUMNS.index("seconds"), PASS_COLUMNS.index("tokens")
    try:
        for _, line in numbered_lines(path):
            cells = line.split(b",")
            try:
                if line.endswith(b"\n") and len(cells) == len(PASS_COLUMNS):
                    took, held = float(cells[places[0]]), float(cells[places[1]])
                    seconds.append(took)
                    tokens.append(held)
            except ValueError:  # the header
                continue
    except OSError:
        return None
    if not seconds:
        return None
    return {
        "count": len(seconds),
        "seconds_p50": percentile(seconds, 50),
        "seconds_p99": percentile(seconds, 99),
        "seconds_max": max(seconds),
        "tokens_p50": percentile(tokens, 50),
    }
