"""``experiment=tune``: what a search may vary on this machine, and what is done with the best of it."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from harness.basics import files
from harness.basics.errors import UserError, printable
from harness.config import checks, compose
from harness.config.compose import without_hydra
from harness.config.engine_schemas import owners
from harness.engines import catalogue as engines
from harness.machine.device import accelerator, cores, cuda_devices, device_name
from harness.models import locate
from harness.running import target
from harness.running.sweep import Sweep
from harness.running.sweep_table import SweepJob, choices
from harness.workload import catalogue, reading

if TYPE_CHECKING:
    from optuna.trial import Trial

MARK = "# Found by a search on "  # in the first lines of what is written there
EXPERIMENTS = Path(__file__).resolve().parents[2] / "conf" / "experiment"
MORE = 4  # times as many requests confirm the best as searched for them
# Of the search alone: what it finds is not to be run on few requests.
SEARCH_KEYS = ("dataset.num_samples", "repeat", "timeout_s")


def check(composed: DictConfig) -> None:
    """Refuses, before the first trial, a search whose winner could not be confirmed or written down."""
    checks.check_sweep(sweep := compose.to_config(composed).sweep)
    path = EXPERIMENTS / f"{sweep.save_as}.yaml"
    if sweep.save_as is not None and path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        found = f"{sweep.save_as} is an experiment that no search has written"
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
    """Runs the best jobs of a search and the defaults on more requests, prints the winner and writes it down.

    Args:
        composed: the config of the search.

    Returns:
        The exit status: 0 when there is a winner, whatever became of single trials.

    Raises:
        UserError: no trial was ok, or the winner cannot be written.
        KeyboardInterrupt: the user ended a run.
    """
    sweep.show()
    searched = sorted((job for job in sweep.jobs if job.rate), key=lambda job: -job.rate)
    if not searched:
        found = f"none of the {len(sweep.jobs)} trials was ok"
        raise UserError("sweep", found, "their errors are above; make one of them run by itself first")
    winner, report = searched[0], "on the requests of the search"
    if composed.sweep.confirm:
        requests = _confirming(composed)
        sweep.say(f"\nthe best of them, and the defaults, on {requests} requests:")
        final = _confirm(sweep, searched, composed.sweep.confirm, requests)
        final.show()
        winner = max(final.jobs, key=lambda job: job.rate)
        if not winner.rate:
            raise UserError("sweep.confirm", "no run of the best was ok", "their errors are above")
        default = final.jobs[-1].rate
        report = f"on {requests} requests" + (f", {winner.rate / default:.2f} times the defaults" if default else "")
        report += "" if len(winner.runs) > 1 else "; one run each: repeat=3 shows how much they vary"
    assert sweep.compose is not None
    chosen = sweep.compose(winner.overrides)
    found_values = {key: files.plain(OmegaConf.select(chosen, key)) for key in choices(searched[0].varied)}
    _announce(sweep, composed, winner, found_values, f"{winner.rate:,.1f} total tokens/s {report}")
    return 0


def _confirm(sweep: Sweep, searched: list[SweepJob], finalists: int, requests: int) -> Sweep:
    """Runs the best of the jobs that differ, and last the one that varies nothing, on so many requests."""
    distinct = {tuple(sorted(job.varied)): job for job in reversed(searched)}
    best = sorted(distinct.values(), key=lambda job: -job.rate)[:finalists]
    common = [word for word in searched[0].overrides if word not in searched[0].varied]
    common = [word for word in common if not word.startswith("dataset.num_samples=")]
    final = Sweep(sweep.full_error)
    final.plan(jobs=len(best) + 1, fixed=sweep.fixed)
    for varied in [*(job.varied for job in best), []]:
        line = [*common, f"dataset.num_samples={requests}", *varied]
        assert sweep.compose is not None
        final.run(line, sweep.compose(line), varied)
    return final


def _confirming(composed: DictConfig) -> int:
    """Returns how many requests confirm the best: ``sweep.confirm_samples``, as far as the dataset has them."""
    dataset = compose.to_config(composed).dataset
    if catalogue.find(dataset.name).makes_requests:
        return int(composed.sweep.confirm_samples or MORE * (dataset.num_samples or 1))
    there = len(reading.read(replace(dataset, num_samples=None)).requests)
    return min(there, composed.sweep.confirm_samples or MORE * (dataset.num_samples or there))


def _announce(sweep: Sweep, composed: DictConfig, winner: SweepJob, found: dict[str, Any], figures: str) -> None:
    """Prints the winning command line, and writes the values ``found`` as an experiment if it has a name."""
    others = _without_search(winner.overrides, found, catalogue.find(composed.dataset.name).makes_requests)
    command = ["python", "harness/main.py", *others]
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    line = shlex.join([*command, *(f"{key}={value}" for key, value in values.items())])
    sweep.say(f"\nwinner: {figures}\n    {line}")
    if composed.sweep.save_as is None:
        return
    path = EXPERIMENTS / f"{composed.sweep.save_as}.yaml"
    simulates = engines.find(str(composed.engine.name)).simulates
    device = f"{composed.hardware.name} (simulated)" if simulates else device_name(accelerator())
    overlay = OmegaConf.create()
    for key, value in found.items():
        OmegaConf.update(overlay, key, value)
    lines = [
        "# @package _global_",
        f"{MARK}{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, for {printable(composed.model.name)} and "
        f"{printable(composed.dataset.name)} on {printable(device)}:",
        f"# {figures}; run {winner.runs[-1].run_id}",
        OmegaConf.to_yaml(overlay),
    ]
    try:
        files.replace(path, "\n".join(lines).encode())
    except UserError as error:
        raise UserError("sweep.save_as", f"{path} cannot be written", "use the command line above") from error
    beside = [word.partition("=")[2].strip("[]") for word in others if word.startswith("experiment=")]
    names = ",".join([*beside, path.stem])
    plain_words = [word for word in command if not word.startswith("experiment=")]
    shown = shlex.join([*plain_words, f"experiment={f'[{names}]' if beside else names}"])
    sweep.say(f"written to {os.path.relpath(path)}:\n    {shown}")


def _without_search(overrides: list[str], found: dict[str, Any], makes_requests: bool) -> list[str]:
    """Returns the overrides that a plain run keeps: not what was searched, nor what only the search needs."""
    dropped = {*found, *SEARCH_KEYS}
    if makes_requests:  # without a file there is no other number of them
        dropped.discard("dataset.num_samples")
    kept = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "experiment":
            names = [name for name in value.strip("[]").split(",") if name != "tune"]
            kept += [f"experiment=[{','.join(names)}]"] if names else []
        elif key.lstrip("+") not in dropped and not key.startswith(("sweep.", "hydra")):
            kept.append(word)
    return kept
