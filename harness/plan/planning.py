"""Puts a plan together: one setting in full, or every split of so many devices in a line."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError
from harness.config.explain import explain
from harness.config.schema import HardwareConfig
from harness.costs import bounds, lengths
from harness.costs.bounds import Bound, Limits
from harness.costs.lengths import Length, Lengths
from harness.costs.memory import Held, Needs
from harness.costs.pass_time import PassTime
from harness.costs.shape import ModelShape
from harness.plan import published, text
from harness.running import job as jobs
from harness.running import preflight, target
from harness.running.job import Job
from harness.running.target import Target

BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)
YES, SHORT, NO = "yes", "with short contexts only", "no"
FEWER_BITS = (8, 4)


@dataclass(frozen=True, slots=True)
class Case:
    """A job on a machine, as far as a split of it does not matter.

    Attributes:
        job: of one rank; only its sums are split.
        bits: of weights and KV cache, as asked; None for what the engine has.
    """

    job: Job
    machine: Target
    lengths: Lengths
    bits: tuple[int | None, int | None]

    @property
    def rows(self) -> int:
        """Sequences that the engine runs at once."""
        return min(preflight.share(self.job).rows, len(self.lengths.items))

    def shape(self) -> ModelShape:
        """Returns the model's shape; raises UserError where its sizes are not known."""
        return preflight.model_shape(self.job, *self.bits)

    def held(self, tp: int, dp: int) -> Held:
        """Returns what the memory of one rank goes to."""
        needs = preflight.memory_needs(self.job, *self.bits)
        assert isinstance(needs, Needs)
        local = min(tp * dp, self.machine.launch.host_ranks) if self.machine.memory.shared else 1
        return preflight.held(self.job, needs, self.shape(), self.machine.memory, tp, local)

    def verdict(self, found: Held) -> str:
        """Returns whether the model and the requests have room: all that the engine runs at once, one, or none."""
        longest = self.lengths.held[-1]
        if found.most_tokens < longest:
            return NO
        return YES if found.most_tokens >= self.rows * longest else SHORT


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Prints the plan; returns the exit status: 1 where nothing fits."""
    case = _case(options, composed)
    if options.devices is not None:
        found = ranking(case, options.devices, composed)
        fits = any(one["fits"] != NO for one in found["splits"])
        shown = text.ranking
    else:
        found = plan(case, composed)
        fits = found["fits"] != NO
        shown = text.plan
    print(json.dumps(found, indent=2) if options.json else shown(found))
    return 0 if fits else 1


def _case(options: argparse.Namespace, composed: DictConfig) -> Case:
    job = jobs.prepare(jobs.with_split(composed, 1, 1), planned=target.described(_hardware(composed)))
    hardware, devices = job.config.hardware, options.devices
    if devices is not None and devices % (nodes := options.nodes or 1):
        raise UserError("--nodes", f"{nodes} does not divide the {devices} devices", "give a number that does")
    if options.nodes is not None:
        hardware = replace(hardware, devices_per_node=devices // options.nodes)
    hardware = replace(hardware, devices_per_node=hardware.devices_per_node or target.HOST_DEVICES)
    machine = target.described(hardware, devices)
    if machine.memory.size is None:
        remedy = "give hardware.memory_bytes=BYTES, or hardware= a machine whose data sheet is in conf/hardware"
        raise UserError("hardware.memory_bytes", f"not known of {hardware.name}", remedy)
    job = replace(job, config=replace(job.config, hardware=hardware))
    found = lengths.of(job.workload.requests, job.max_context, job.config.generation.max_output_len)
    if not found.items:
        raise UserError("dataset", f"all {found.rejected} requests are longer than the model's context", "take others")
    return Case(job, machine, found, (options.weight_bits, options.kv_bits))


def _hardware(composed: DictConfig) -> HardwareConfig:
    try:
        found = OmegaConf.to_object(composed.hardware)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(found, HardwareConfig)
    return found


def plan(case: Case, composed: DictConfig) -> dict[str, Any]:
    """Returns all that is said of one setting; raises UserError for a split that the checks refuse."""
    tp, dp, why = _split(case, composed)
    found, shape = case.held(tp, dp), case.shape()
    fits = case.verdict(found)
    answer: dict[str, Any] = {
        "model": _model(case, shape),
        "hardware": {"name": case.job.config.hardware.name, "accelerator": case.job.accelerator},
        "parallel": {"tp": tp, "dp": dp, "devices": tp * dp, "why": why},
        "dataset": _dataset(case),
        "memory": _memory(found),
        "fits": fits,
        "remedies": [] if fits == YES else remedies(case, tp, dp, fits),
        "sequences": _sequences(case, found),
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


def _model(case: Case, shape: ModelShape) -> dict[str, Any]:
    return {
        "name": case.job.work["model"],
        "dtype": case.job.dtype,
        "parameters": shape.total,
        "matmul_parameters": shape.matmul,
        "head_parameters": shape.head,
        "weight_bits": shape.weight_bytes * 8,
        "kv_bits": shape.kv_element_bytes * 8,
        "kv_bytes_per_token": shape.kv_token_bytes,
    }


def _dataset(case: Case) -> dict[str, Any]:
    return {
        "name": case.job.workload.name,
        "requests": len(case.lengths.items),
        "rejected": case.lengths.rejected,
        "prompt_tokens": case.lengths.prompt_tokens,
        "output_tokens": case.lengths.output_tokens,
        "lengths": case.lengths.source,
        "mean_length": case.lengths.mean_held,
        "p99_length": case.lengths.p99_held,
    }


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
    """Returns the nearest settings that fit better than ``now``, each with how well: the smallest change of a kind."""
    found: list[dict[str, str]] = []
    larger = range(tp + 1, case.machine.launch.host_ranks // dp + 1)
    choices = [(f"parallel.tp={size}", case, size) for size in larger if jobs.refusal(case.job, size, dp) is None]
    weights, cache = case.bits
    shape = case.shape()
    for bits in FEWER_BITS:
        if bits < 8 * shape.kv_element_bytes:
            other = replace(case, bits=(weights, bits))
            choices.append((f"a KV cache of {bits} bits (--kv-bits {bits})", other, tp))
    for bits in FEWER_BITS:
        if bits < 8 * shape.weight_bytes:
            other = replace(case, bits=(bits, cache))
            choices.append((f"weights of {bits} bits (--weight-bits {bits})", other, tp))
    done: set[str] = set()  # kinds of change that have one which fits wholly
    for words, other, size in choices:
        kind, fits = words.rstrip(")0123456789"), other.verdict(other.held(size, dp))
        kind = kind.partition(" of ")[0]
        if kind not in done and (fits == YES or (fits == SHORT and now == NO)):
            found.append({"setting": words, "fits": fits})
            done |= {kind} if fits == YES else set()
    return found


def _performance(case: Case, shape: ModelShape, found: Held, tp: int, dp: int) -> dict[str, Any]:
    limits = Limits.of(shape, case.job.config.hardware, case.job.dtype, tp)
    sequences = bounds.sequences_at_once(case.lengths, found.most_tokens)
    at_best = bounds.bounds(limits, case.lengths, dp, sequences)
    sheet = bounds.bounds(replace(limits, matrix_share=1.0, memory_share=1.0), case.lengths, dp, sequences)
    return {
        "shares": {"matrix": limits.matrix_share, "memory": limits.memory_share},
        "passes": [_pass(case, shape, limits, budget, sequences, tp, dp) for budget in BUDGETS],
        "bounds": {name: _bound(bound, sheet[name], tp * dp) for name, bound in at_best.items()},
        "dataset_time": {"bound_s": at_best["mix"].elapsed_s, **_expected(case, shape, found, tp, dp)},
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
        "expected_s": _times(case, shape, tp, dp).seconds(work),
    }


def _times(case: Case, shape: ModelShape, tp: int, dp: int) -> PassTime:
    hosts_ranks = min(tp * dp, case.machine.launch.host_ranks)
    return PassTime(shape, case.job.config.hardware, case.job.dtype, tp, hosts_ranks)


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


def _expected(case: Case, shape: ModelShape, found: Held, tp: int, dp: int) -> dict[str, Any]:
    """Returns what the dataset is expected to take with the engine's own settings: as many typical passes as it needs.

    The last requests, which no others follow, and the replicas' unequal parts are not in it: ``engine=simulate`` has
    both.
    """
    engine = preflight.share(case.job)
    longest = max(length.prompt for length in case.lengths.items)
    rows = max(1, min(case.rows, len(case.lengths.items) // dp))
    sequences = bounds.sequences_at_once(case.lengths, min(found.tokens, found.most_tokens), rows)
    work = bounds.typical_pass(case.lengths, engine.pass_tokens or longest, sequences)
    times = _times(case, shape, tp, dp)
    fed = sum(case.lengths.held)
    passes = max(fed / work.tokens / dp, max(length.output for length in case.lengths.items))
    between = times.host_seconds(work, 0, 0)
    requests = times.host_seconds(work, len(case.lengths.items), case.lengths.prompt_tokens) - between
    seconds = passes * (times.seconds(work) + between) + requests / dp
    tokens = case.lengths.prompt_tokens + case.lengths.output_tokens
    return {
        "expected_s": seconds,
        "expected_total_tokens_per_s": tokens / seconds,
        "expected_pass_tokens": work.tokens,
        "fitted": times.fitted is not None,
        "outside_the_fit": times.outside,
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
        "model": _model(case, case.shape()),
        "hardware": {"name": case.job.config.hardware.name, "devices": devices, "nodes": nodes},
        "dataset": _dataset(case),
        "splits": splits,
        "refused": refused,
    }


def _line(case: Case, tp: int, dp: int) -> dict[str, Any]:
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
    expected = _expected(case, shape, found, tp, dp)
    return line | {
        "binds": bound.binds,
        "bound_total_tokens_per_s": bound.total_tokens_per_s,
        "expected_total_tokens_per_s": expected["expected_total_tokens_per_s"],
        "expected_s": expected["expected_s"],
    }
