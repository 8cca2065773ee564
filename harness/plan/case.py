"""What a plan is asked: a job, a machine that need not be this one, and the sums that any split of them needs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError
from harness.config.explain import explain
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs import bounds, lengths
from harness.costs.hardware import known
from harness.costs.lengths import Lengths
from harness.costs.memory import Held, Needs
from harness.costs.pass_time import PassTime
from harness.costs.shape import ModelShape
from harness.results.efficiency import money
from harness.running import job as jobs
from harness.running import preflight, sizes, target
from harness.running.job import Job
from harness.running.target import Target

NOT_SHARED = "; every prompt computed in full, engine.prefix_sharing is not planned: engine=simulate has it"
NOT_DRAFTED = "; every output token in a pass of its own, engine.draft is not planned"
YES, SHORT, NO = "yes", "with short contexts only", "no"


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

    def of_split(self, tp: int, dp: int) -> Case:
        """Returns the same with the engine's sizes as this split has them."""
        split = replace(self.job.split, tp=tp, dp=dp)
        return replace(self, job=sizes.settle(replace(self.job, split=split), self.machine))

    def shape(self) -> ModelShape:
        """Returns the model's shape; raises UserError where its sizes are not known."""
        return preflight.model_shape(self.job, *self.bits)

    def held(self, tp: int, dp: int) -> Held:
        """Returns what the memory of one rank goes to."""
        needs = preflight.memory_needs(self.job, *self.bits)
        assert isinstance(needs, Needs)
        local = min(tp * dp, self.machine.launch.host_ranks) if self.machine.memory.shared else 1
        return preflight.held(self.job, needs, self.shape(), self.machine.memory, tp, local)

    def lacks(self, found: Held) -> str | None:
        """Returns what there is no room for; None where one request at least can run."""
        if found.own + found.weights > found.size:
            return "weights"
        if preflight.share(self.job).given is not None and found.cache > found.most_cache:
            return "the KV cache of engine.kv_memory beside the weights"
        if found.most_tokens < self.lengths.held[-1]:
            return "a KV cache of the longest request beside the weights"
        return None

    def verdict(self, found: Held) -> str:
        """Returns whether the model and the requests have room: all that the engine runs at once, one, or none."""
        longest = self.lengths.held[-1]
        if self.lacks(found) is not None:
            return NO
        return YES if found.most_tokens >= self.rows * longest else SHORT


def of(options: argparse.Namespace, composed: DictConfig) -> Case:
    """Returns what the command line asks; raises UserError for what is wrong with it, or not known of the machine."""
    job = jobs.prepare(jobs.with_split(composed, 1, 1), planned=target.described(_hardware(composed)))
    hardware, devices = known(job.config.hardware, job.dtype), options.devices
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
    case = Case(job, machine, found, (options.weight_bits, options.kv_bits))
    case.shape()  # now, since everything rests on it
    return case


def _hardware(composed: DictConfig) -> HardwareConfig:
    try:
        found = OmegaConf.to_object(composed.hardware)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(found, HardwareConfig)
    return found


def model(case: Case) -> dict[str, Any]:
    """Returns what is said of the model."""
    shape = case.shape()
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


def dataset(case: Case) -> dict[str, Any]:
    """Returns what is said of the dataset."""
    engine = case.job.config.engine
    sharing, drafting = getattr(engine, "prefix_sharing", False), getattr(engine, "draft", None) is not None
    return {
        "name": case.job.workload.name,
        "requests": len(case.lengths.items),
        "rejected": case.lengths.rejected,
        "prompt_tokens": case.lengths.prompt_tokens,
        "output_tokens": case.lengths.output_tokens,
        "lengths": case.lengths.source + (NOT_SHARED if sharing else "") + (NOT_DRAFTED if drafting else ""),
        "mean_length": case.lengths.mean_held,
        "p99_length": case.lengths.p99_held,
    }


def times(case: Case, tp: int, dp: int) -> PassTime:
    """Returns how long passes of such a split take."""
    hosts_ranks = min(tp * dp, case.machine.launch.host_ranks)
    return PassTime(case.shape(), case.job.config.hardware, case.job.dtype, tp, hosts_ranks)


def expected(case: Case, found: Held, tp: int, dp: int) -> dict[str, Any]:
    """Returns what the dataset is expected to take with the engine's own settings: as many typical passes as it needs.

    The last requests, which no others follow, and the replicas' unequal parts are not in it: ``engine=simulate`` has
    both.
    """
    engine = preflight.share(case.job)
    longest = max(length.prompt for length in case.lengths.items)
    rows = max(1, min(case.rows, len(case.lengths.items) // dp))
    sequences = bounds.sequences_at_once(case.lengths, min(found.tokens, found.most_tokens), rows)
    fed = sum(case.lengths.held)
    at_end = fed / dp / max(length.output for length in case.lengths.items)  # a request takes a pass an output token
    budget = max(1, min(engine.pass_tokens or longest, int(at_end)))
    work = bounds.typical_pass(case.lengths, budget, sequences)
    model = times(case, tp, dp)
    passes = fed / work.tokens / dp
    between = model.host_seconds(work, 0, 0)
    requests = model.host_seconds(work, len(case.lengths.items), case.lengths.prompt_tokens) - between
    seconds = passes * (model.seconds(work) + between) + requests / dp
    tokens = case.lengths.prompt_tokens + case.lengths.output_tokens
    return {
        "expected_s": seconds,
        "expected_total_tokens_per_s": tokens / seconds,
        "expected_cost_per_million_tokens": _cost(case, seconds, tp * dp, tokens),
        "expected_pass_tokens": work.tokens,
        "fitted": model.fitted is not None,
        "fit_error": None if model.fitted is None else model.fitted.error,
        "outside_the_fit": model.outside,
    }


def _cost(case: Case, seconds: float, ranks: int, tokens: int) -> float | None:
    """Returns what a million tokens cost, as the column of a run; None without ``hardware.price_per_hour``."""
    hardware = case.job.config.hardware
    if hardware.price_per_hour is None:
        return None
    devices = -(-ranks // case.machine.launch.host_ranks) if hardware.accelerator is Accelerator.cpu else ranks
    return money(hardware.price_per_hour, devices, seconds) / tokens * 1e6
