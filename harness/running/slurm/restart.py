"""A Slurm job that was queued again: its command line is that of its first start, and its run is to be resumed."""

from __future__ import annotations

from omegaconf import DictConfig

from harness.basics.errors import UserError
from harness.machine import slurm
from harness.ranks.rank import Rank
from harness.results.directory import read_record


def check(composed: DictConfig) -> slurm.SlurmJob:
    """Returns the job that ``requeue`` is about.

    Raises:
        UserError: there is none, or it is to do several runs.
    """
    if (job := slurm.current()) is None:
        remedy = "start it with sbatch launch/slurm.sbatch ..., or leave it out"
        raise UserError("requeue", "true, and this is no Slurm job", remedy)
    if composed.repeat != 1 or composed.repeat_until is not None or composed.sweep.resume:
        found = "true with repeat or sweep.resume: a job that starts again can resume one run"
        raise UserError("requeue", found, "use -m hydra/launcher=slurm, which gives each run a job of its own")
    return job


def taken_up(composed: DictConfig, overrides: list[str], rank: Rank | None) -> list[str] | None:
    """Has the job's run resumed if it is not the job's first start; the user may name another run to resume.

    Args:
        composed: the config, whose ``resume`` is set.

    Returns:
        The overrides that compose this config; None where the run is complete, and nothing is left to do.

    Raises:
        UserError: see :func:`check`.
    """
    job = check(composed)
    results_dir = str(composed.results_dir)
    run_id = slurm.begun_run(results_dir, job) if job.restarts else None
    if run_id is None:
        return overrides
    first = rank is None or rank.first
    if (read_record(results_dir, run_id) or {}).get("status") == "ok":
        if first:
            print(f"job {job.name} was queued again, but its run {run_id} is complete")
        return None
    if first:
        print(f"job {job.name} was queued again: its run {run_id} is resumed", flush=True)
    composed.resume = run_id
    return [*(word for word in overrides if word.partition("=")[0] != "resume"), f"resume={run_id}"]
