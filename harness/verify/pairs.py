"""Two runs of the same work, request by request: where their tokens part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from harness.basics.errors import UserError, one_line, quoted
from harness.config.schema import DatasetConfig
from harness.verify.runs import RecordedRun
from harness.workload import catalogue

# What settles which tokens are right, beside the dataset and the model: (group of the config, key, where it counts).
RULES = (
    ("generation", "stop", "stop rule"),
    ("generation", "max_output_len", "cap on outputs"),
)


@dataclass(frozen=True, slots=True)
class Divergence:
    """How two completions of one request differ.

    Attributes:
        position: of the first token that differs, counted from 0 in the output; None where the ids are not why.
        ids: the two runs' ids there, in the order of the runs; None for one that had ended.
        reason: what else differs, on one line; None where it is nothing but tokens, which rounding may explain.
    """

    index: int
    position: int | None
    ids: tuple[int | None, int | None]
    reason: str | None = None


@dataclass(slots=True)
class Pair:
    """Two runs, compared.

    Attributes:
        compared: requests that are in both and were completed by both.
        alone: indices that only one of the runs has (or completed), by run.
        mixed_rejections: of those, how many the other run rejected.
    """

    compared: int = 0
    exact: int = 0
    differences: list[Divergence] = field(default_factory=list)
    alone: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    mixed_rejections: int = 0


def refuse_other_work(one: RecordedRun, other: RecordedRun) -> None:
    """Raises UserError unless both runs were given the same requests, model and rules."""
    for name, mine, others in _work(one, other):
        if mine != others:
            raise UserError(
                "--against",
                f"{other.run_id} did other work than {one.run_id}: "
                f"its {name} is {quoted(others, 80)}, not {quoted(mine, 80)}",
                "compare runs of the same model, dataset, stop rule and caps",
            )


def _work(one: RecordedRun, other: RecordedRun) -> Iterator[tuple[str, Any, Any]]:
    dataset = one.setting("dataset", "name")
    kinds = ["simulated" if run.record.get("simulated") else "computed" for run in (one, other)]
    yield "kind of tokens", kinds[0], kinds[1]
    for name in ("model", "weights"):
        yield name, one.record.get(name), other.record.get(name)
    if one.record.get("weights") == "dummy":
        yield "model.architecture", one.setting("model", "architecture"), other.setting("model", "architecture")
        # What draws them decides what they are.
        for name in ("dtype", "device"):
            yield f"{name} of dummy weights", one.record.get(name), other.record.get(name)
        mine, others = (f"{'deepspeed' if _by_deepspeed(run) else 'torch'}, {_place(run)}" for run in (one, other))
        yield "way to draw dummy weights", mine, others
    yield "dataset", dataset, other.setting("dataset", "name")
    yield "dataset's sha256", one.record.get("dataset_sha256"), other.record.get("dataset_sha256")
    defaults = {field.name: field.default for field in fields(DatasetConfig)}  # an earlier version had fewer keys
    for key in catalogue.settings_of(str(dataset)):
        mine, others = (run.setting("dataset", key) for run in (one, other))
        yield f"dataset.{key}", defaults[key] if mine is None else mine, defaults[key] if others is None else others
    for group, key, name in RULES:
        yield f"{name} ({group}.{key})", one.setting(group, key), other.setting(group, key)
    for key in ("stop_strings", "stop_token_ids"):  # which older runs have not
        yield f"generation.{key}", one.setting("generation", key) or [], other.setting("generation", key) or []


def _by_deepspeed(run: RecordedRun) -> bool:
    return run.record.get("kernels") == "deepspeed"


def _place(run: RecordedRun) -> str:
    """Returns where a run's dummy weights were drawn; for tensor-parallel ranks, which cut them up, on the host."""
    tp = run.record.get("tp")
    return "on the host" if isinstance(tp, int) and tp > 1 else f"on {run.record.get('device')}"


def compare(one: RecordedRun, other: RecordedRun) -> Pair:
    """Compares two runs of the same work.

    Raises:
        UserError: they have no request in common.
    """
    lines = [{line["index"]: line for line in run.completions} for run in (one, other)]
    done = [{i for i, line in by_index.items() if line["finish_reason"] != "rejected"} for by_index in lines]
    both = sorted(done[0] & done[1])
    if not both:
        raise UserError("--against", f"{one.run_id} and {other.run_id} completed no request in common", "name another")
    pair = Pair(compared=len(both), alone=(sorted(done[0] - done[1]), sorted(done[1] - done[0])))
    pair.mixed_rejections = sum(i in lines[1] for i in pair.alone[0]) + sum(i in lines[0] for i in pair.alone[1])
    for index in both:
        difference = divergence_of(index, lines[0][index], lines[1][index])
        if difference is None:
            pair.exact += 1
        else:
            pair.differences.append(difference)
    return pair


def divergence_of(index: int, one: dict[str, Any], other: dict[str, Any]) -> Divergence | None:
    """Returns how two completions of a request differ; None if they are equal in ids, counts and end."""
    ids: tuple[list[int], list[int]] = (one["token_ids"], other["token_ids"])
    position = first_difference(*ids)
    here = (None, None) if position is None else (_at(ids[0], position), _at(ids[1], position))
    if one["prompt_tokens"] != other["prompt_tokens"]:
        reason = f"prompts of {one['prompt_tokens']} and {other['prompt_tokens']} tokens"
        return Divergence(index, position, here, reason)
    if position is None:
        if one["finish_reason"] == other["finish_reason"]:
            return None
        ends = f"{one_line(one['finish_reason'], 20)} and {one_line(other['finish_reason'], 20)}"
        return Divergence(index, None, here, f"the same tokens end by {ends}")
    if None in here:
        return Divergence(index, position, here, f"one ends after {position} tokens, the other continues")
    return Divergence(index, position, here)


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Returns the first position at which two lists differ, the end of a shorter one among them; None if equal."""
    if one == other:
        return None
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _at(ids: list[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None
