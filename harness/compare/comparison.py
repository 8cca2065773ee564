"""Groups of runs side by side: each against a baseline, what sets them apart, and what makes them incomparable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.compare.cautions import cautions
from harness.compare.choosing import filtered, named_baseline, usual_baseline
from harness.compare.groups import Group, group
from harness.compare.ratios import set_ratios
from harness.compare.reading import KEYS, UNKNOWN, ComparedRun, settings_of, shown
from harness.results.columns import FIGURES

# A difference in one of these makes two throughputs figures of different work, or of different machines.
COMPARABLE = (
    *("dataset", "generation.stop", "generation.stop_strings", "generation.stop_token_ids"),
    *("dataset.num_samples", "rejected requests", "generation.max_output_len"),
    *("dataset.input_len", "dataset.output_len", "dataset.shared_prefix", "dataset.shuffle", "dataset.chat_template"),
    *("dataset.system_prompt", "model", "model.weights", "model.dtype", "simulated", "device_name"),
)
# What a prediction need not have in common with what it predicts.
UNPREDICTED = ("engine", "engine.kernels", "engine.eos_rate", "engine.pace", "simulated", "device_name", "git_commit")
UNPREDICTED_GROUPS = ("hardware", "model.path", "model.tokenizer", "model.demo", "dataset.path")
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
        cautions: why figures of single runs are not.
    """

    groups: list[Group]
    hidden: int
    baseline: Group | None
    reason: str
    keys: list[str]
    figures: list[str]
    warnings: list[Incomparable]
    cautions: list[str]


def compare(
    runs: Sequence[ComparedRun], baseline: str | None = None, where: Iterable[str] = (), limit: int | None = None
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
    chosen = named_baseline(everything, baseline) if baseline is not None else None
    groups = filtered(everything, where)
    reason = "as asked for"
    if chosen is None:
        chosen, reason = usual_baseline(groups)
    elif chosen not in groups:
        groups.append(chosen)
    groups.sort(key=lambda one: (one.ok == 0, one.simulated != "", -(one.throughput or 0.0), one.started_at))
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
    if baseline is not None:
        set_ratios(seen, baseline)
    _set_beside(seen)
    figures = [name for name in FIGURES if any(one.figures[name] is not None for one in seen)]
    warnings = _warnings(seen, baseline) if baseline is not None else []
    return Comparison(
        seen, len(groups) - len(seen), baseline, reason, differing_keys(seen), figures, warnings, list(cautions(seen))
    )


def _set_beside(groups: list[Group]) -> None:
    """Gives each measured group the simulated one of the same settings: a fitted one before others, then the last."""
    simulated = [(_predicting(one.settings), one) for one in groups if one.simulated and one.throughput]
    simulated.sort(key=lambda pair: (pair[1].simulated == "fit", pair[1].started_at))
    for one in groups:
        one.predicted = None
        if simulated and not one.simulated and one.throughput:
            mine = _predicting(one.settings).items()
            one.predicted = next((other for its, other in reversed(simulated) if its.items() <= mine), None)


def _predicting(settings: dict[str, Any]) -> dict[str, str]:
    """Returns the settings that a prediction has in common with what it predicts."""
    return {
        key: shown("", value)
        for key, value in settings.items()
        if key not in UNPREDICTED and not key.startswith(UNPREDICTED_GROUPS)
    }


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
    if name == "simulated":
        return one.simulated or "measured"
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
