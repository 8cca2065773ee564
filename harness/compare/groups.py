"""Runs side by side: repeated ones as one group, each group against a baseline, and what sets them apart."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas

from harness.basics.errors import UserError, printable, quoted
from harness.compare.reading import DIGESTS, FIGURES, KEYS, Run, settings_of

# Repeated runs agree in these columns: the job, the code, the machine, and what "auto" came to on it.
IDENTITY = (
    *("config_hash", "dataset_sha256", "git_commit", "device", "device_name", "tp", "dp"),
    *("kernels", "model", "dtype", "quantization", "requests", "token_budget", "max_sequences"),
)
# A difference in one of these makes two throughputs figures of different work, or of different machines.
COMPARABLE = (
    *("dataset", "generation.stop", "dataset.num_samples", "rejected requests", "generation.max_output_len"),
    *("dataset.input_len", "dataset.output_len", "model", "model.weights", "model.dtype", "device_name"),
)
# Keys that follow from another one, and say something only where that one is the same.
IMPLIED = {
    "engine.kernels": "engine",
    "model.architecture.": "model",
    "model.path": "model",
    "model.tokenizer": "model",
    "model.demo": "model",
    "hardware.": "hardware",
    "dataset.path": "dataset",
    "dataset_sha256": "dataset",
    "device": "device_name",
}
UNKNOWN = object()


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
        differs_in: what makes that ratio one of different work or machines.
    """

    runs: list[Run]
    shown: Run
    figures: dict[str, float | None]
    low: float | None
    high: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    differs_in: list[str] = field(default_factory=list)

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


@dataclass(slots=True)
class Incomparable:
    """One way in which groups are not comparable with the baseline."""

    differs_in: str
    baseline: Any
    values: list[Any]
    run_ids: list[str]

    def __str__(self) -> str:
        one = len(self.run_ids) == 1
        found = ", ".join(shown(self.differs_in, value) for value in self.values[:4])
        found += f" and {len(self.values) - 4} more" if len(self.values) > 4 else ""
        groups = self.run_ids[0] if one else f"{len(self.run_ids)} groups"
        name = "another dataset" if self.differs_in == "dataset" else self.differs_in
        return f"{groups} not comparable with the baseline: {name}: {found}; baseline: " + shown(
            self.differs_in, self.baseline
        )


@dataclass(slots=True)
class Comparison:
    """What was compared: groups best first, failed ones last, and the settings that set them apart.

    Args:
        groups: those to show.
        hidden: how many more there are.
        baseline: the group all ratios are to; None when no run is ok.
        reason: why that group is the baseline.
        keys: settings with more than one value among ``groups``.
        figures: figures that are known for some group.
        warnings: why ratios in ``groups`` are not to be taken at face value.
    """

    groups: list[Group]
    hidden: int
    baseline: Group | None
    reason: str
    keys: list[str]
    figures: list[str]
    warnings: list[Incomparable]


def shown(key: str, value: Any) -> str:
    """Returns a setting as text, as a person would type it; a digest by its first digits."""
    if value is UNKNOWN:
        return "?"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if key in DIGESTS:
        return str(value)[:8]
    return printable(str(value))


def compare(
    runs: Sequence[Run], baseline: str | None = None, where: Iterable[str] = (), limit: int | None = None
) -> Comparison:
    """Groups ``runs`` and sets each group against a baseline.

    Args:
        baseline: a run id, or a part of one that no other group has.
        where: ``KEY=VALUE`` conditions; values of one key are alternatives.
        limit: how many groups to show; those not shown are not read beyond their row.

    Raises:
        UserError: there is no such baseline, it is not ok, or ``where`` names no known key or leaves nothing.
    """
    everything = group(runs)
    chosen = _named_baseline(everything, baseline) if baseline is not None else None
    groups = _filtered(everything, where)
    reason = "as asked for"
    if chosen is None:
        chosen, reason = _usual_baseline(groups)
    elif chosen not in groups:
        groups.append(chosen)
    groups.sort(key=lambda one: (one.ok == 0, -(one.throughput or 0.0), one.started_at))
    return _presented(groups, chosen, reason, limit)


def limited(comparison: Comparison, limit: int) -> Comparison:
    """Returns the best ``limit`` groups of a comparison, and its baseline, as a comparison of their own."""
    return _presented(comparison.groups, comparison.baseline, comparison.reason, limit)


def _presented(groups: list[Group], baseline: Group | None, reason: str, limit: int | None) -> Comparison:
    seen = groups if limit is None else groups[:limit]
    if baseline is not None and baseline not in seen:
        seen = [*seen, baseline]
    for one in seen:
        one.settings = one.settings or settings_of(one.runs)
        if baseline is not None and baseline.throughput and one.throughput is not None:
            one.ratio = one.throughput / baseline.throughput
    figures = [name for name in FIGURES if any(one.figures[name] is not None for one in seen)]
    warnings = _warnings(seen, baseline) if baseline is not None else []
    return Comparison(seen, len(groups) - len(seen), baseline, reason, differing_keys(seen), figures, warnings)


# --- groups ---


def group(runs: Sequence[Run]) -> list[Group]:
    """Returns the groups of ``runs``, in the order of their first runs; settings and ratios are not filled in."""
    table = pandas.DataFrame([{name: run.cells.get(name, "") for name in IDENTITY} for run in runs])
    alone = pandas.Series([run.run_id for run in runs]).where(table["config_hash"] == "", "")
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


def _median_run(runs: list[Run], median: float | None) -> Run:
    measured = [run for run in runs if run.ok and run.numbers.get("total_tokens_per_s") is not None]
    if median is None or not measured:
        return next((run for run in reversed(runs) if run.ok), runs[-1])
    return min(measured, key=lambda run: abs((run.numbers["total_tokens_per_s"] or 0.0) - median))


# --- which groups ---


def _named_baseline(groups: list[Group], name: str) -> Group:
    remedy = "take one from the first column of the table"
    owners = {run.run_id: one for one in groups for run in one.runs}
    matches = [name] if name in owners else [run_id for run_id in owners if name and name in run_id]
    if not matches:
        near = difflib.get_close_matches(name, list(owners)[-1000:], n=3, cutoff=0.5)
        raise UserError(
            "--baseline", f"no run id has {quoted(name)} in it", f"near: {', '.join(near)}" if near else remedy
        )
    chosen = owners[matches[0]]
    if any(owners[run_id] is not chosen for run_id in matches):
        more = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
        raise UserError("--baseline", f"{quoted(name)} is in {', '.join(matches[:3])}{more}", "give more of the run id")
    run = next(run for run in chosen.runs if run.run_id == matches[0])
    if chosen.ok == 0 or (name == run.run_id and not run.ok):
        status = run.cells.get("status") or "of unknown status"
        other = f"its repetition {chosen.run_id} is" if chosen.ok else "name a run that is"
        raise UserError("--baseline", f"{run.run_id} is {status}, not ok", other)
    return chosen


def _usual_baseline(groups: list[Group]) -> tuple[Group | None, str]:
    finished = sorted((one for one in groups if one.throughput), key=lambda one: one.started_at)
    plain = [one for one in finished if one.shown.cells.get("engine") == "baseline"]
    if len(plain) == 1:
        return plain[0], "the only one with engine=baseline"
    return (finished[0], "the oldest") if finished else (None, "no run is ok")


def _filtered(groups: list[Group], where: Iterable[str]) -> list[Group]:
    """Returns the groups that meet all conditions; ``status`` is one of a group's runs."""
    conditions: dict[str, list[str]] = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals or not key.strip():
            raise UserError("--where", f"{quoted(condition)} is not KEY=VALUE", "for example engine.token_budget=256")
        key = key.strip().removesuffix(".name")
        conditions.setdefault(KEYS.get(key, key), []).append(value.strip())
    if not conditions:
        return list(groups)
    for one in groups:
        one.settings = settings_of(one.runs)
    known = {"status", "config_hash", "run_id", *KEYS.values(), *(key for one in groups for key in one.settings)}
    kept = list(groups)
    for key, values in conditions.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *KEYS], n=3, cutoff=0.5)
            raise UserError(
                "--where", f"no run has a key {quoted(key)}", f"near: {', '.join(near)}" if near else "see --help"
            )
        before, kept = kept, [one for one in kept if any(_meets(one, key, value) for value in values)]
        if not kept:
            texts = {text for one in before for text in _texts(one, key)}
            there = sorted(texts, key=lambda text: (_number(text) or 0.0, text))
            has = (
                f"there: {', '.join(there[:5])}" + (", ..." if len(there) > 5 else "")
                if there
                else "it is unknown there"
            )
            raise UserError("--where", f"no group left with {key}={' or '.join(values)}", has)
    return kept


def _texts(one: Group, key: str) -> list[str]:
    if key in ("status", "config_hash", "run_id"):
        return [run.cells.get(key, "") for run in one.runs]
    return [shown("", one.settings[key])] if key in one.settings else []


def _meets(one: Group, key: str, value: str) -> bool:
    if key in (*DIGESTS, "config_hash"):
        return any(value and text.startswith(value) for text in _texts(one, key))
    return any(text == value or _number(text) == _number(value) is not None for text in _texts(one, key))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- what sets them apart ---


def differing_keys(groups: list[Group]) -> list[str]:
    """Returns the settings with more than one known value, columns of the table first.

    A key that another one implies is left out where its value follows from that one's.
    """
    values: dict[str, set[str]] = {key: set() for key in KEYS.values()}
    for one in groups:
        for key, value in one.settings.items():
            values.setdefault(key, set()).add(shown("", value))
    found = [key for key, texts in values.items() if len(texts) > 1]
    for prefix, owner in IMPLIED.items():
        for key in [key for key in found if key.startswith(prefix)]:
            pairs = {(one.settings.get(owner), shown("", one.settings[key])) for one in groups if key in one.settings}
            if owner in found and len(pairs) == len({value for value, _ in pairs}):
                found.remove(key)
    return found


def _compared(one: Group, name: str) -> Any:
    if name == "rejected requests":
        known = [run.numbers.get("rejected") for run in one.runs if run.ok]
        return UNKNOWN if not known or known[0] is None else int(known[0])
    return one.settings.get(name, UNKNOWN)


def _warnings(groups: list[Group], baseline: Group) -> list[Incomparable]:
    """Notes on each group what makes it incomparable, and returns one warning for each kind."""
    found: dict[str, Incomparable] = {}

    def differ(one: Group, name: str, mine: Any, its: Any) -> None:
        one.differs_in.append(name)
        warning = found.setdefault(name, Incomparable(name, its, [], []))
        warning.run_ids.append(one.run_id)
        if mine not in warning.values:
            warning.values.append(mine)

    for one in groups:
        one.differs_in = []
        if one.throughput is None or one is baseline:
            continue
        for name in COMPARABLE:
            mine, its = _compared(one, name), _compared(baseline, name)
            if mine is not UNKNOWN and its is not UNKNOWN and mine != its:
                differ(one, name, mine, its)
            elif name == "dataset":
                mine, its = _compared(one, "dataset_sha256"), _compared(baseline, "dataset_sha256")
                if mine is not UNKNOWN and its is not UNKNOWN and mine != its:
                    differ(one, name, f"{_compared(one, name)} {mine[:8]}", f"{_compared(baseline, name)} {its[:8]}")
    return [found[name] for name in COMPARABLE if name in found]
