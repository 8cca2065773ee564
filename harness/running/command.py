"""What a composed command line asks of this process: a rank's part of a run, a run, or several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from harness.basics.errors import FULL_ERROR, INTERRUPTED, UserError, complain
from harness.basics.places import RUN
from harness.config import compose
from harness.ranks.rank import RUN_ID_VARIABLE, Rank

if TYPE_CHECKING:
    from harness.running.sweep import Sweep

# The modules that do the work are imported where they are needed: a mistyped command line is refused within a second.


def run(composed: DictConfig, rank: Rank | None) -> int:
    """Runs a composed config: as a rank, as the process that starts ranks, or several times; returns the exit status.

    Raises:
        UserError: the command line makes no sense, or nothing can be written.
    """
    hydra_config = HydraConfig.get()
    compose.check_choices(hydra_config.runtime.choices)
    overrides = list(hydra_config.overrides.task)
    if rank is None and hydra_config.runtime.choices.get("hydra/launcher") == "slurm":
        raise UserError("hydra/launcher", "slurm is for the jobs of a sweep", "add -m; one job is a sweep too")
    if composed.requeue and RUN_ID_VARIABLE not in os.environ:
        from harness.running.slurm import restart

        again = restart.taken_up(composed, overrides, rank)
        if again is None:
            return 0
        overrides = again
    if composed.resume is not None:
        from harness.running import resume

        composed = resume.compose(composed, overrides, rank)
    # A rank that our own launcher started has one of several runs to do already.
    if rank is None or RUN_ID_VARIABLE not in os.environ:
        if composed.sweep.confirm or composed.sweep.save_as is not None:
            raise UserError("experiment", "a search has several jobs", f"add -m: {' '.join(RUN)} -m ...")
        several = composed.repeat > 1 or composed.repeat_until is not None
        if (several or composed.sweep.resume) and _can_run(composed):
            key = "repeat" if composed.repeat_until is None else "repeat_until"
            return _repeat(composed, overrides) if drives(rank, f"{key}={composed[key]}") else 0
    if rank is None:
        from harness.running import start

        return start.run(composed, overrides)
    from harness.running import worker

    return worker.run(composed, rank)


def _repeat(composed: DictConfig, overrides: list[str]) -> int:
    """Runs the same config several times, each in a launch of its own."""
    from harness.running.sweep import Sweep

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep = Sweep(os.environ.get(FULL_ERROR))
    sweep.plan(jobs=1, fixed={word.partition("=")[0] for word in overrides})

    def jobs() -> int:
        sweep.run([sweep.add(overrides, composed)])
        return 0

    return concluded(sweep, jobs)


def concluded(sweep: Sweep, jobs: Callable[[], int]) -> int:
    """Has ``jobs`` give ``sweep`` its runs and shows what came of them; returns the exit status.

    Args:
        jobs: returns the exit status for where the sweep got no jobs.
    """
    try:
        status = jobs()
        if not sweep.jobs:
            return status
        if sweep.composed is not None and (sweep.composed.sweep.confirm or sweep.composed.sweep.save_as):
            from harness.running import tune

            return tune.conclude(sweep, sweep.composed)
    except KeyboardInterrupt:
        complain("interrupted")
        return sweep.conclude(interrupted=True) if sweep.jobs else INTERRUPTED
    return sweep.conclude()


def drives(rank: Rank | None, what: str) -> bool:
    """Returns whether this process starts several runs: a plain one does, and of a launch the first rank.

    Raises:
        UserError: the launch spans several hosts, on which no rank can start another.
    """
    if rank is not None and rank.several_hosts:
        raise UserError(
            what,
            f"several runs need several launches, and this one spans {rank.world // rank.local_world} hosts",
            f"use {' '.join(RUN)} -m ... on one host, or a shell loop over launch/multi_node.py",
        )
    return rank is None or rank.first


def _can_run(composed: DictConfig) -> bool:
    """Returns whether nothing is wrong with the job; if it is, one run says so as well as several."""
    from harness.running import job

    try:
        job.prepare(composed)
    except UserError:
        return False
    return True
