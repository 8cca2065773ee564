"""basics/intervals.py: what can be said of the median of a few figures, held against a known truth."""

from __future__ import annotations

import math
import random

import pytest

from harness.basics.intervals import Interval, of_median, of_ratio, of_rounds


def figures(drawn: random.Random, rate: float, count: int, slowed: float = 0.2) -> list[float]:
    """Returns rates of a noisy machine: 2% of noise, and now and then something else that takes a part of it."""
    found = []
    for _ in range(count):
        disturbed = drawn.expovariate(3.0) if drawn.random() < slowed else 0.0
        found.append(rate * math.exp(drawn.gauss(0.0, 0.02) - disturbed))
    return found


@pytest.mark.parametrize("count", [3, 8, 20])
@pytest.mark.parametrize("slowed", [0.0, 0.3])
def test_the_interval_has_the_truth_in_it(count: int, slowed: float) -> None:
    drawn = random.Random(count)
    right = {"rounds": 0, "ratio": 0}
    trials = 40
    for _ in range(trials):
        one, other = figures(drawn, 103.0, count, slowed), figures(drawn, 100.0, count, slowed)
        rounds = of_rounds(dict(enumerate(one)), dict(enumerate(other)))
        for name, found in (("rounds", rounds), ("ratio", of_ratio(one, other))):
            assert found is not None and found.count == count and found.paired is (name == "rounds")
            right[name] += found.low <= 1.03 <= found.high
    assert min(right.values()) >= 38, right


def test_a_drift_of_the_machine_cancels_in_rounds_alone() -> None:
    drawn = random.Random(0)
    drift = [1.0 - 0.06 * number for number in range(8)]
    one = [rate * by for rate, by in zip(figures(drawn, 103.0, 8, 0.0), drift, strict=True)]
    other = [rate * by for rate, by in zip(figures(drawn, 100.0, 8, 0.0), drift, strict=True)]
    paired, apart = of_rounds(dict(enumerate(one)), dict(enumerate(other))), of_ratio(one, other)
    assert paired is not None and apart is not None
    assert paired.low <= 1.03 <= paired.high and paired.width < apart.width / 3


def test_of_rounds_only_those_of_both_count() -> None:
    one = {("a", 1): 2.0, ("a", 2): 2.2, ("a", 3): 2.0, ("b", 1): 90.0}
    other = {("a", 3): 1.0, ("a", 1): 1.0, ("a", 2): 1.0, ("a", 4): 7.0}
    found = of_rounds(one, other)
    assert found is not None
    assert (found.middle, found.count, found.paired) == (2.0, 3, True)
    del other["a", 1]
    assert of_rounds(one, other) is None


def test_figures_that_are_all_the_same_have_no_width() -> None:
    found = of_median([0.3, 0.3, 0.3])
    assert found == Interval(0.3, 0.3, 0.3, 3)
    same = of_ratio([7.1] * 3, [7.1] * 4)
    assert same is not None and (same.low, same.high, same.clear) == (1.0, 1.0, False)
    more = of_ratio([7.2] * 3, [7.1] * 4)
    assert more is not None and more.clear


def test_few_figures_have_no_interval_and_wild_ones_a_wide_one() -> None:
    assert of_median([1.0, 2.0]) is None and of_ratio([1.0] * 9, [2.0] * 2) is None
    wild = of_median([1e-9, 1.0, 1e9])
    assert wild is not None and 0.0 < wild.low < 1e-9 and 1e9 < wild.high < math.inf


def test_the_same_figures_have_the_same_interval() -> None:
    values = figures(random.Random(4), 10.0, 9)
    first = of_median(values)
    assert first is not None and first == of_median(values)
    less = of_median(values, confidence=0.9)
    assert less is not None and first.low < less.low < less.middle < less.high < first.high
