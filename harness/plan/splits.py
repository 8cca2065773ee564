"""Every split of so many devices into replicas, one line each."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from harness.basics.errors import UserError
from harness.costs import bounds
from harness.costs.bounds import Limits
from harness.plan.case import NO, Case, dataset, expected, model
from harness.running import job as jobs


def ranking(case: Case, devices: int, composed: DictConfig) -> dict[str, Any]:
    """Returns every split of ``devices``, those that fit first and the fastest of them first."""
    asked = (composed.parallel.tp, composed.parallel.dp)
    for name, size in zip(("tp", "dp"), asked, strict=True):
        if size is not None and devices % size:
            found = f"{size} does not divide the {devices} devices"
            raise UserError(f"parallel.{name}", found, "give a number that does, or leave it out")
    pairs = [(tp, devices // tp) for tp in range(1, devices + 1) if devices % tp == 0]
    pairs = [(tp, dp) for tp, dp in pairs if asked[0] in (None, tp) and asked[1] in (None, dp)]
    if not pairs:
        raise UserError("parallel", f"tp={asked[0]} x dp={asked[1]} is not {devices}", "leave one of them out")
    splits, refused = [], []
    for tp, dp in pairs:
        try:
            if reason := jobs.refusal(case.job, tp, dp):
                raise reason
            splits.append(_line(case, tp, dp))
        except UserError as error:
            if error.field.startswith("hardware.") and error.field != "hardware.node_bandwidth":
                raise
            refused.append({"tp": tp, "dp": dp, "why": str(error)})
    splits.sort(key=lambda one: (one["fits"] == NO, -(one["expected_total_tokens_per_s"] or 0)))
    nodes = -(-devices // case.machine.launch.host_ranks)
    return {
        "model": model(case),
        "hardware": {"name": case.job.config.hardware.name, "devices": devices, "nodes": nodes},
        "dataset": dataset(case),
        "splits": splits,
        "refused": refused,
    }


def _line(case: Case, tp: int, dp: int) -> dict[str, Any]:
    case = case.of_split(tp, dp)
    found, shape = case.held(tp, dp), case.shape()
    fits = case.verdict(found)
    line: dict[str, Any] = {
        "tp": tp,
        "dp": dp,
        "fits": fits,
        "weights_bytes": found.weights,
        "largest_kv_cache_tokens": found.most_tokens,
        "expected_total_tokens_per_s": None,
    }
    if fits == NO:
        return line
    limits = Limits.of(shape, case.job.config.hardware, case.job.dtype, tp)
    bound = bounds.bounds(limits, case.lengths, dp, bounds.sequences_at_once(case.lengths, found.most_tokens))["mix"]
    hoped = expected(case, found, tp, dp)
    return line | {
        "binds": bound.binds,
        "bound_total_tokens_per_s": bound.total_tokens_per_s,
        "expected_total_tokens_per_s": hoped["expected_total_tokens_per_s"],
        "expected_s": hoped["expected_s"],
    }
