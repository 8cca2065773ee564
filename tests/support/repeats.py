"""The cases that ``tests/repeats.txt`` leaves to ``--all``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parents[1] / "repeats.txt"


def kept() -> dict[str, int]:
    """Returns how many cases of each test the tier of minutes keeps, by the test's id without a case's."""
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    return {node: int(count) for count, node in (line.split() for line in lines)}


def beyond(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """Yields the cases that are not kept."""
    most, seen = kept(), Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] > most.get(test, len(items)):
            yield item
