"""``accuracy.json``: what an evaluation found, and how it differs from another's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.config.identity import UNHASHED_KEYS, flat

FILE = "accuracy.json"
# Differences in these are not listed: nothing of them reaches a score.
UNSAID = (*UNHASHED_KEYS, "hardware")
BESIDE = ("kernels", "dtype", "device_name", "prefill")  # what the config does not say


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of two evaluations.

    Attributes:
        text: both, and the difference as its kind of figure is compared.
        worse: whether ours is worse than theirs by more than was allowed.
    """

    name: str
    text: str
    worse: bool


def read(results_dir: str, run: str) -> dict[str, Any]:
    """Returns the record of an evaluation, named by its id, its directory or its file.

    Raises:
        UserError: there is none, or it is not one.
    """
    named = [Path(results_dir) / run / FILE, Path(run) / FILE, Path(run)]
    path = next((path for path in named if path.is_file()), None)
    if path is None:
        raise UserError(
            "--against", f"no evaluation {quoted(run)} in {results_dir}", "give its id, as its summary says"
        )
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not ({"perplexity", "tasks"} <= record.keys()):
        raise UserError("--against", f"{path} is not the record of an evaluation", f"give one that wrote {FILE}")
    return record


def check_comparable(tasks: Sequence[str] | None, other: dict[str, Any]) -> None:
    """Raises UserError where the other evaluation is known not to have what this one will: perplexity, or tasks."""
    if tasks is None and other["perplexity"] is None:
        names = ",".join(other["tasks"])
        raise UserError("--against", f"{other['run_id']} is of tasks, not of perplexity", f"add --tasks {names}")
    if tasks is not None and other["tasks"] is None:
        raise UserError("--against", f"{other['run_id']} is of perplexity, not of tasks", "leave out --tasks")
    missing = [name for name in tasks or () if name.isidentifier() and name not in other["tasks"]]
    if missing:
        remedy = f"it has {', '.join(other['tasks'])}"
        raise UserError("--against", f"{other['run_id']} has no task {', '.join(missing)}", remedy)


def differences(ours: dict[str, Any], theirs: dict[str, Any], within: float) -> list[ComparedFigure]:
    """Returns how each figure compares.

    A perplexity may be higher by ``within`` percent, a task's score lower by ``within`` percentage points.

    Raises:
        UserError: they are not of the same tokens, or of the same questions.
    """
    if ours["perplexity"] is not None:
        return [_perplexity(ours["perplexity"], theirs, within)]
    found = [
        difference
        for name, task in ours["tasks"].items()
        if not task["subtask"]
        for difference in _task(name, task, theirs, within)
    ]
    _same_questions(ours, theirs)
    return found


def _perplexity(ours: dict[str, Any], other: dict[str, Any], within: float) -> ComparedFigure:
    theirs = other["perplexity"]
    if ours["fingerprint"] != theirs["fingerprint"] or ours["scored"] != theirs["scored"]:
        raise UserError(
            "--against",
            f"{other['run_id']} is of {theirs['scored']} prompts and {theirs['tokens']:,} tokens, this one of "
            f"{ours['scored']} and {ours['tokens']:,}, or of others",
            "give both the same dataset, num_samples and tokenizer",
        )
    before, now = _finite(theirs["perplexity"]), _finite(ours["perplexity"])
    ratio = now / before
    percent = round(100 * (ratio - 1), 9)
    text = f"{before:.4f} -> {now:.4f}, ratio {ratio:.4f} ({percent:+.2f}%)"
    return ComparedFigure("perplexity", text, not percent <= within)


def _task(name: str, ours: dict[str, Any], other: dict[str, Any], within: float) -> list[ComparedFigure]:
    theirs = (other["tasks"] or {}).get(name)
    same = ("version", "n_shot", "samples")
    if theirs is None or any(theirs[key] != ours[key] for key in same):
        has = "no such task" if theirs is None else ", ".join(f"{key} {theirs[key]}" for key in same)
        is_ = ", ".join(f"{key} {ours[key]}" for key in same)
        raise UserError("--against", f"{name} is of {is_}, and {other['run_id']} has {has}", "run both alike")
    found = []
    for metric, value in ours["metrics"].items():
        if metric not in ours["scores"] or metric not in theirs["metrics"]:
            continue
        before, value = _finite(theirs["metrics"][metric]), _finite(value)
        points = round(100 * (value - before), 9)
        text = f"{before:.4f} -> {value:.4f}, {points:+.2f} percentage points"
        found.append(ComparedFigure(f"{name} {metric}", text, not -points <= within))
    if not found:
        raise UserError(
            "--against", f"{name} has no score from 0 to 1 in which higher is better", "choose another task"
        )
    return found


def _same_questions(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, task in ours["tasks"].items():
        other = theirs["tasks"].get(name)
        if other is not None and other["hash"] != task["hash"]:
            remedy = "give both the same data and settings of the task"
            raise UserError("--against", f"{name} asked other questions in {theirs['run_id']}", remedy)


def _finite(value: float | None) -> float:
    return float("nan") if value is None else value  # JSON has no infinity


def settings_that_differ(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Returns ``key: theirs -> ours`` for each setting that may matter."""
    mine, others = flat(ours["config"]), flat(theirs["config"])
    mine |= {name: ours.get(name) for name in BESIDE}
    others |= {name: theirs.get(name) for name in BESIDE}
    keys = [key for key in (mine | others) if mine.get(key) != others.get(key)]
    return [f"{key}: {others.get(key)} -> {mine.get(key)}" for key in keys if key.split(".")[0] not in UNSAID]
