"""Puts a plan together: one setting in full, or every split of so many devices in a line."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from harness.basics.errors import UserError
from harness.costs import bounds, lengths
from harness.costs.bounds import Bound, Limits
from harness.costs.lengths import Length, Lengths
from harness.costs.memory import Held
from harness.costs.shape import ModelShape
from harness.plan import published, splits, text
from harness.plan.case import NO, SHORT, YES, Case, dataset, expected, model, of, times
from harness.running import job as jobs
from harness.running import preflight

FEWER_BITS = (8, 4)
PART = 0.9  # of what the weights leave: a KV cache that has room where one of given bytes has not
BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Prints the plan; returns the exit status: 1 where nothing fits."""
    case = of(options, composed)
    if options.devices is not None:
        found = splits.ranking(case, options.devices, composed)
        fits = any(one["fits"] != NO for one in found["splits"])
        shown = text.ranking
    else:
        found = plan(case, composed)
        fits = found["fits"] != NO
        shown = text.plan
    print(json.dumps(found, indent=2) if options.json else shown(found))
    return 0 if fits else 1


def plan(case: Case, composed: DictConfig) -> dict[str, Any]:
    """Returns all that is said of one setting; raises UserError for a split that the checks refuse."""
    tp, dp, why = _split(case, composed)
    case = case.of_split(tp, dp)
    found, shape = case.held(tp, dp), case.shape()
    fits = case.verdict(found)
    answer: dict[str, Any] = {
        "model": model(case),
        "hardware": {"name": case.job.config.hardware.name, "accelerator": case.job.accelerator},
        "parallel": {"tp": tp, "dp": dp, "devices": tp * dp, "why": why},
        "dataset": dataset(case),
        "memory": _memory(found),
        "fits": fits,
        "lacks": case.lacks(found),
        "remedies": [] if fits == YES else remedies(case, tp, dp, fits),
        "sequences": _sequences(case, found),
        "sizes": None if case.job.sizes is None else case.job.sizes.record,
    }
    return answer if fits == NO else answer | _performance(case, shape, found, tp, dp)


def _split(case: Case, composed: DictConfig) -> tuple[int, int, str]:
    """Returns tp, dp and why; where nothing that fits can be chosen, the largest tp that the checks allow."""
    asked = (composed.parallel.tp, composed.parallel.dp)
    try:
        chosen = jobs.choose(replace(case.job, split=replace(case.job.split, asked=asked)), case.machine)
        tp, dp, why = chosen.tp, chosen.dp, chosen.why
    except UserError as error:
        if error.field != "parallel":
            raise
        sizes = [tp for tp in range(1, case.machine.launch.host_ranks + 1) if not jobs.refusal(case.job, tp, 1)]
        tp, dp, why = max(sizes, default=1), asked[1] or 1, "the most that the model can be shared by"
    if refused := jobs.refusal(case.job, tp, dp):
        raise refused
    return tp, dp, why


def _memory(found: Held) -> dict[str, Any]:
    return {
        "size_bytes": found.size,
        "own_bytes": found.own,
        "weights_bytes": found.weights,
        "activations_bytes": found.activations,
        "kv_cache_bytes": found.cache,
        "left_bytes": found.left,
        "kv_cache_tokens": found.tokens,
        "largest_kv_cache_bytes": found.most_cache,
        "largest_kv_cache_tokens": found.most_tokens,
    }


def _sequences(case: Case, found: Held) -> dict[str, Any]:
    """Returns how many sequences have room at once, in the engine's KV cache and in the largest."""
    mean, p99 = case.lengths.mean_held, case.lengths.p99_held
    return {
        "engine": case.rows,
        "of_mean_length": int(found.tokens / mean),
        "of_p99_length": found.tokens // p99,
        "of_mean_length_in_largest": int(found.most_tokens / mean),
        "of_p99_length_in_largest": found.most_tokens // p99,
        "length_for_engine": found.most_tokens // case.rows,
    }


def remedies(case: Case, tp: int, dp: int, now: str) -> list[dict[str, str]]:
    """Returns the nearest settings that fit better than ``now``, each with how well.

    Of each kind the smallest change comes first, and the last is the first that fits wholly.
    """
    larger = range(tp + 1, case.machine.launch.host_ranks // dp + 1)
    sizes = [size for size in larger if jobs.refusal(case.job, size, dp) is None]
    (weights, cache), shape = case.bits, case.shape()
    fewer_kv = [bits for bits in FEWER_BITS if bits < 8 * shape.kv_element_bytes]
    fewer = [bits for bits in FEWER_BITS if bits < 8 * shape.weight_bytes]
    kinds = [
        [(f"parallel.tp={size}", case, size) for size in sizes],
        [(f"KV cache of {bits} bits (--kv-bits {bits})", replace(case, bits=(weights, bits)), tp) for bits in fewer_kv],
        [(f"weights of {bits} bits (--weight-bits {bits})", replace(case, bits=(bits, cache)), tp) for bits in fewer],
    ]
    if preflight.share(case.job).given is not None:
        kinds.insert(0, [(f"engine.kv_memory={PART} of what is left", _with_part(case, PART), tp)])
    found: list[dict[str, str]] = []
    for kind in kinds:
        for words, other, size in kind:
            fits = other.verdict(other.held(size, dp))
            if fits == YES or (fits == SHORT and now == NO):
                found.append({"setting": words, "fits": fits})
            if fits == YES:
                break
    return found


def _with_part(case: Case, part: float) -> Case:
    """Returns the same with a part of the memory that is left as KV cache, in place of bytes."""
    config = case.job.config
    engine = replace(config.engine, kv_memory=part)  # type: ignore[call-arg]
    return replace(case, job=replace(case.job, config=replace(config, engine=engine)))


def _performance(case: Case, shape: ModelShape, found: Held, tp: int, dp: int) -> dict[str, Any]:
    limits = Limits.of(shape, case.job.config.hardware, case.job.dtype, tp)
    sequences = bounds.sequences_at_once(case.lengths, found.most_tokens)
    at_best = bounds.bounds(limits, case.lengths, dp, sequences)
    sheet = bounds.bounds(replace(limits, matrix_share=1.0, memory_share=1.0), case.lengths, dp, sequences)
    return {
        "shares": {"matrix": limits.matrix_share, "memory": limits.memory_share},
        "passes": [_pass(case, shape, limits, budget, sequences, tp, dp) for budget in BUDGETS],
        "bounds": {name: _bound(bound, sheet[name], tp * dp) for name, bound in at_best.items()},
        "dataset_time": {"bound_s": at_best["mix"].elapsed_s, **expected(case, found, tp, dp)},
        "published": _published(case, shape),
    }


def _pass(
    case: Case, shape: ModelShape, limits: Limits, budget: int, sequences: float, tp: int, dp: int
) -> dict[str, Any]:
    work = bounds.typical_pass(case.lengths, budget, sequences)
    seconds = limits.seconds(work)
    binds = max(seconds, key=lambda name: seconds[name])
    return {
        "token_budget": budget,
        "tokens": work.tokens,
        "sequences": work.sequences,
        "flops": limits.flops(work),
        "bytes": limits.bytes(work),
        "seconds": seconds[binds],
        "binds": binds,
        "expected_s": times(case, tp, dp).seconds(work),
    }


def _bound(bound: Bound, sheet: Bound, devices: int) -> dict[str, Any]:
    return {
        "seconds": bound.seconds,
        "binds": bound.binds,
        "total_tokens_per_s": bound.total_tokens_per_s,
        "total_tokens_per_s_per_device": bound.total_tokens_per_s / devices,
        "output_tokens_per_s": bound.output_tokens_per_s,
        "output_tokens_per_s_per_device": bound.output_tokens_per_s / devices,
        "sheet_total_tokens_per_s": sheet.total_tokens_per_s,
    }


def _published(case: Case, shape: ModelShape) -> list[dict[str, Any]]:
    """Returns published figures of this model on such devices, with their share of the bound.

    The bound is that of requests of the published lengths; where those differ from request to request, 512 and 512
    stand in, since attention is a hundredth of the FLOPs. Systems that ran with fewer bits have no share here.
    """
    job = case.job
    found = []
    for one in published.of(job.work["model"], job.config.hardware.name):
        entry: dict[str, Any] = {**one._asdict(), "bound": None, "share": None}
        if one.total and one.bits == 16:
            plain = ModelShape.of(job.source.architecture, job.dtype)
            requests = Lengths([Length(*(one.lengths or (512, 512)))] * 1000, lengths.CLAIMED, 0)
            limits = Limits.of(plain, job.config.hardware, job.dtype, one.devices)
            bound = bounds.bounds(limits, requests, 1, float("inf"))["mix"]
            entry["bound"] = bound.total_tokens_per_s / one.devices
            entry["share"] = one.per_device / entry["bound"]
        found.append(entry)
    return found
