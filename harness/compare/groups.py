"""Repeated runs as one group: which runs belong together, and the figures of the group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas

from harness.basics.intervals import Interval
from harness.compare.reading import ComparedRun
from harness.results.columns import FIGURES, TABLE, names_of

JOB = "config_hash"
# Repeated runs agree in these columns: the job, the code, the machine, and what "auto" came to on it.
IDENTITY = (JOB, *names_of(column for column in TABLE if column.repeats and column.name != JOB))


@dataclass(slots=True, eq=False)
class Group:
    """Repeated runs of one config on one machine.

    Args:
        runs: in the order they were read.
        shown: the run that stands for the group: the one of median throughput, or the last if none is ok.
        figures: medians over the ok runs, by column; None where unknown.
        low: lowest total_tokens_per_s of an ok run.
        high: highest total_tokens_per_s of an ok run.
        settings: what is known of the config, by the command line's names.
        ratio: total_tokens_per_s over the baseline's.
        interval: where that ratio lies; None where there are too few runs to say.
        differs_in: what makes that ratio one of different work or machines.
        predicted: of a measured group, the simulated one of the same settings; None where there is none.
    """

    runs: list[ComparedRun]
    shown: ComparedRun
    figures: dict[str, float | None]
    low: float | None
    high: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    interval: Interval | None = None
    differs_in: list[str] = field(default_factory=list)
    predicted: Group | None = None

    @property
    def simulated(self) -> str:
        """What its times were computed from; empty for measured ones."""
        return next((run.cells["simulated"] for run in self.runs if run.cells.get("simulated")), "")

    @property
    def prediction_error(self) -> float | None:
        """The predicted total_tokens_per_s over the measured one, less 1; None where not both are known."""
        predicted = None if self.predicted is None else self.predicted.throughput
        return predicted / self.throughput - 1 if predicted is not None and self.throughput else None

    @property
    def run_id(self) -> str:
        """The id of the run that stands for the group."""
        return self.shown.run_id

    @property
    def ok(self) -> int:
        """How many of the runs are ok."""
        return sum(run.ok for run in self.runs)

    @property
    def throughput(self) -> float | None:
        """Median total tokens per second."""
        return self.figures["total_tokens_per_s"]

    @property
    def spread(self) -> float | None:
        """(highest - lowest) / median of total_tokens_per_s; None for fewer than two figures."""
        if self.ok < 2 or self.low is None or self.high is None or not self.throughput:
            return None
        return (self.high - self.low) / self.throughput

    @property
    def rates(self) -> list[float]:
        """The positive total_tokens_per_s of the ok runs."""
        known = (run.numbers.get("total_tokens_per_s") for run in self.runs if run.ok)
        return [rate for rate in known if rate]

    @property
    def by_round(self) -> dict[Hashable, float]:
        """The same by the rounds of sweeps, as far as their records say."""
        known = ((run.round(), run.numbers.get("total_tokens_per_s")) for run in self.runs if run.ok)
        return {place: rate for place, rate in known if place is not None and rate}

    @property
    def statuses(self) -> Counter[str]:
        """How the runs ended."""
        return Counter(run.cells.get("status") or "unknown" for run in self.runs)

    @property
    def error(self) -> str:
        """Why the last run that has an error failed; empty without one."""
        return next((run.cells["error"] for run in reversed(self.runs) if run.cells.get("error")), "")

    @property
    def started_at(self) -> str:
        """When the first run began; text that sorts by time, unknown last."""
        return min(run.cells.get("started_at") or "~" for run in self.runs)


def group(runs: Sequence[ComparedRun]) -> list[Group]:
    """Returns the groups of ``runs``, in the order of their first runs; settings and ratios are not filled in."""
    table = pandas.DataFrame([{name: run.cells.get(name, "") for name in IDENTITY} for run in runs])
    alone = pandas.Series([run.run_id for run in runs]).where(table[JOB] == "", "")
    numbers = pandas.DataFrame([{name: run.numbers.get(name) if run.ok else None for name in FIGURES} for run in runs])
    numbers = numbers.astype(float)
    numbers["group"] = _with_early_ends(
        table, alone, [run.ok for run in runs], [run.cells.get("status") == "invalid" for run in runs]
    )
    by_group = numbers.groupby("group", sort=False)
    medians = by_group.median()
    medians["low"], medians["high"] = by_group["total_tokens_per_s"].min(), by_group["total_tokens_per_s"].max()
    found = []
    for number, values in zip(medians.index, medians.to_dict("records"), strict=True):
        figures = {name: None if math.isnan(value) else value for name, value in values.items()}
        low, high = figures.pop("low"), figures.pop("high")
        members = [runs[index] for index in by_group.indices[number]]
        found.append(Group(members, _median_run(members, figures["total_tokens_per_s"]), figures, low, high))
    return found


def _with_early_ends(table: pandas.DataFrame, alone: pandas.Series, ok: list[bool], refused: list[bool]) -> list[int]:
    """Returns the group number of each row.

    A run that began and failed before it knew its dataset or device has empty cells: it belongs to the group of the
    same config that it contradicts in no cell, if there is just one.
    """
    numbers = table.assign(alone=alone).groupby([*IDENTITY, "alone"], sort=False).ngroup().tolist()
    rows = table.to_numpy().tolist()
    complete: dict[str, dict[int, list[str]]] = {}
    for number, cells, is_ok in zip(numbers, rows, ok, strict=True):
        if is_ok and cells[0]:
            complete.setdefault(cells[0], {})[number] = cells
    for index, cells in enumerate(rows):
        if ok[index] or refused[index] or not cells[0]:
            continue
        matches = [
            number
            for number, others in complete.get(cells[0], {}).items()
            if all(mine in ("", other) for mine, other in zip(cells, others, strict=True))
        ]
        if len(matches) == 1:
            numbers[index] = matches[0]
    return numbers


def _median_run(runs: list[ComparedRun], median: float | None) -> ComparedRun:
    measured = [run for run in runs if run.ok and run.numbers.get("total_tokens_per_s") is not None]
    if median is None or not measured:
        return next((run for run in reversed(runs) if run.ok), runs[-1])
    return min(measured, key=lambda run: abs((run.numbers["total_tokens_per_s"] or 0.0) - median))
