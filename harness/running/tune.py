"""``experiment=tune``: what a search may vary on this machine, and what is done with the best of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from harness.basics.errors import UserError
from harness.config import checks, compose
from harness.config.compose import without_hydra
from harness.config.engine_schemas import owners
from harness.config.own import own_option
from harness.engines import catalogue as engines
from harness.machine.device import accelerator, cores, cuda_devices
from harness.models import locate
from harness.running import confirming, target, winner
from harness.running.sweep import Sweep
from harness.running.sweep_table import SweepJob
from harness.workload import reading

if TYPE_CHECKING:
    from optuna.trial import Trial

MORE = 4  # times as many requests confirm the best as searched for them


def check(composed: DictConfig) -> None:
    """Refuses, before the first trial, a search whose winner could not be confirmed or written down."""
    config = compose.to_config(composed)
    checks.check_sweep(config.sweep)
    checks.repeat_until(config.repeat_until)
    name = config.sweep.save_as
    if name is not None and not winner.may_replace(own_option("experiment", name)):
        found = f"{name} is an experiment that no search has written"
        raise UserError("sweep.save_as", found, "give another name, or null")


def search_space(composed: DictConfig, trial: Trial) -> None:
    """Adds the parallel splits of this machine, or the simulated one, to a trial, unless the command line fixes them.

    Optuna's sweeper calls it (``hydra.sweeper.custom_search_space``) with the config of the sweep.

    Raises:
        UserError: the engine has nothing to tune here, or the model cannot be found.
    """
    engine, able = str(composed.engine.name), owners("token_budget")
    if engine not in able:
        raise UserError(
            "engine",
            f"{engine} has no token_budget to tune",
            f"use engine={' or '.join(able)}, or sweep over its own keys with -m",
        )
    if {"parallel", "parallel.tp", "parallel.dp"} & {str(name).lstrip("+") for name in trial.user_attrs}:
        return
    settings = compose.to_config(without_hydra(composed))
    if engines.find(engine).simulates:
        source, machine = locate.described(settings.model), target.described(settings.hardware)
        cuda, devices = machine.accelerator == "cuda", machine.launch.host_ranks
    else:
        source, cuda = locate.locate(settings.model), accelerator() == "cuda"
        devices = cuda_devices() if cuda else cores()
    heads = source.architecture.get("num_key_value_heads")
    splits = parallel_splits(devices, cuda, heads if isinstance(heads, int) else None)
    if not engines.find(engine).replicas:
        splits = [(tp, 1) for tp in dict.fromkeys(tp for tp, _ in splits)]
    tp = trial.suggest_categorical("parallel.tp", list(dict.fromkeys(tp for tp, _ in splits)))
    replicas = [dp for split, dp in splits if split == tp]
    trial.suggest_int("parallel.dp", min(replicas), max(replicas))


def parallel_splits(devices: int, cuda: bool, kv_heads: int | None) -> list[tuple[int, int]]:
    """Returns the pairs (tp, dp) to try, none of which leaves a rank without a KV head.

    On GPUs tp is a power of two, and dp what the others allow. On a CPU there are replicas alone: shards of one model
    would share the memory that they have to read anyway, and send each other messages besides.

    Args:
        devices: GPUs, or cores of a CPU.
    """
    count = max(devices, 1)
    if not cuda:
        return [(1, dp) for dp in range(1, count + 1)]
    return [(tp, count // tp) for tp in (2**power for power in range(count.bit_length())) if tp <= (kv_heads or tp)]


def conclude(sweep: Sweep, composed: DictConfig) -> int:
    """Runs the best jobs of a search in turn with the defaults, says which is shown to be faster, and writes it down.

    Args:
        composed: the config of the search.

    Returns:
        The exit status: 0 when trials ran, whatever became of single ones.

    Raises:
        UserError: no trial was ok, or the winner cannot be written.
        KeyboardInterrupt: the user ended a run.
    """
    sweep.show()
    searched = sorted((job for job in sweep.jobs if job.rate), key=lambda job: -job.rate)
    if not searched:
        found = f"none of the {len(sweep.jobs)} trials was ok"
        raise UserError("sweep", found, "their errors are above; make one of them run by itself first")
    if not composed.sweep.confirm:
        best = searched[0]
        figures = f"{best.rate:,.1f} total tokens/s on the requests of the search"
        sweep.say("\nnot compared with the defaults: sweep.confirm=3 does that")
        winner.announce(sweep, composed, best, best.varied, figures)
        return 0
    requests = _confirming(composed, searched[0])
    final = confirming.confirm(sweep, searched, composed, requests)
    verdict = confirming.verdict(final.jobs[:-1], final.jobs[-1])
    if verdict.winner is not None:
        figures = f"{verdict.winner.rate:,.1f} total tokens/s on {requests} requests, {verdict.why}"
        winner.announce(sweep, composed, verdict.winner, verdict.winner.varied, figures)
    else:
        sweep.say(f"\n{verdict.why}; nothing is written")
    return 0


def _confirming(composed: DictConfig, searched: SweepJob) -> int:
    """Returns how many requests confirm the best: ``sweep.confirm_samples``, as far as the dataset has them."""
    assert searched.composed is not None
    asked = searched.composed.dataset.num_samples  # of the trials, which may have got more than the search was given
    there = reading.there(compose.to_config(composed).dataset)
    if there is None:
        return int(composed.sweep.confirm_samples or MORE * (asked or 1))
    return min(there, composed.sweep.confirm_samples or MORE * (asked or there))
