"""Figures over the passes of a run."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.basics.files import numbered_lines
from harness.results.completions import percentile


def pass_rows(path: Path, *names: str) -> Iterator[tuple[float, ...]]:
    """Yields the named columns of a ``passes.csv``, line by line.

    The file's first line says which columns it has: older versions have fewer. Lines that are none (a torn last one),
    or have no number there, are passed over; a file that is not there, or lacks one of the columns, has none.
    """
    places: list[int] = []
    columns = 0
    try:
        for number, line in numbered_lines(path):
            cells = line.decode(errors="replace").strip().split(",")
            if number == 1:
                if not set(names) <= set(cells):
                    return
                places, columns = [cells.index(name) for name in names], len(cells)
            elif line.endswith(b"\n") and len(cells) == columns:
                try:
                    yield tuple(float(cells[place]) for place in places)
                except ValueError:
                    continue
    except OSError:
        return


def pass_figures(path: Path) -> dict[str, Any] | None:
    """Returns how many forward passes a ``passes.csv`` has, how long they took and how full they were.

    Read at a run's end, since nothing is to be counted within the clock. None where there are no passes.
    """
    seconds, tokens = array("d"), array("d")
    for took, held in pass_rows(path, "seconds", "tokens"):
        seconds.append(took)
        tokens.append(held)
    if not seconds:
        return None
    return {
        "count": len(seconds),
        "seconds_p50": percentile(seconds, 50),
        "seconds_p99": percentile(seconds, 99),
        "seconds_max": max(seconds),
        "tokens_p50": percentile(tokens, 50),
    }
