"""The ratio of a group's throughput to the baseline's, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable

from harness.basics.intervals import CONFIDENCE, LEAST, Interval, of_ratio, of_rounds
from harness.compare.groups import Group

LIKE = " ~"
APART = " *"
LEGEND = (
    f"interval: where the ratio lies with {CONFIDENCE:.0%} confidence; ~ no difference shown, for 1 is in it.",
    "* of runs that were not made in rounds: what the machine did between them is in the ratio.",
)


def set_ratios(groups: Iterable[Group], baseline: Group) -> None:
    """Gives each group its ratio and the interval of it.

    Where both have :data:`~harness.basics.intervals.LEAST` runs or more: of the rounds that they have in common, if
    there are as many, else of all their runs. The ratio is the median of the rounds' ratios, or that of the medians.
    """
    its_rounds = baseline.by_round if baseline.ok >= LEAST else {}  # read once
    for one in groups:
        one.ratio = one.interval = None
        if not baseline.throughput or one.throughput is None:
            continue
        one.ratio = one.throughput / baseline.throughput
        if one is baseline or min(one.ok, baseline.ok) < LEAST or bool(one.simulated) != bool(baseline.simulated):
            continue
        one.interval = of_rounds(one.by_round, its_rounds) if its_rounds else None
        if one.interval is not None:
            one.ratio = one.interval.middle
        else:
            one.interval = of_ratio(one.rates, baseline.rates)


def ratio_text(one: Group) -> str:
    """Returns the ratio to the baseline, as text.

    ``!`` marks one that compares different work or machines, ``~`` one that is not shown to be another than 1.
    """
    if one.ratio is None:
        return ""
    text = f"{_factor(one.ratio)}x"
    if one.differs_in:
        return f"{text} !"
    return text + LIKE if one.interval is not None and not one.interval.clear else text


def interval_text(one: Group) -> str:
    """Returns where the ratio lies; empty where it is not known, marked where it is not of rounds."""
    if one.interval is None:
        return ""
    return f"{_end(one.interval.low)}-{_end(one.interval.high)}" + APART * (not one.interval.paired)


def figures(interval: Interval | None) -> dict[str, float | int | bool | None]:
    """Returns what programs are told of an interval; None where there is none."""
    return {
        "ratio_low": None if interval is None else interval.low,
        "ratio_high": None if interval is None else interval.high,
        "ratio_of": None if interval is None else interval.count,
        "ratio_paired": None if interval is None else interval.paired,
    }


def _factor(ratio: float) -> str:
    return f"{ratio:{',.0f' if ratio >= 100 else '.2f' if ratio >= 0.1 else '.2g'}}"


def _end(ratio: float) -> str:
    """Returns an end of an interval; with three digits where two would say nothing of a narrow one."""
    return f"{ratio:.3f}" if 0.5 < ratio < 2 else _factor(ratio) if 0.01 < ratio < 1e4 else f"{ratio:.0e}"
