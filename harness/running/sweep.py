"""Many runs, one after another: the jobs of a sweep, and the repetitions of a config.

Each is a ``deepspeed`` launch of its own: the number of ranks can change from one to the next, device memory and
process groups start fresh, and one that crashes or hangs is a row with its status while the others go on.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from harness.basics.errors import INTERRUPTED, REFUSED, UserError, full_error, one_line, printable, quoted
from harness.basics.terminal import console
from harness.config.explain import explain
from harness.results.directory import read_record
from harness.results.table import read_rows
from harness.running import job as jobs
from harness.running import launcher
from harness.running.sweep_table import FILE_WIDTH, Follower, SweepJob, SweepRun, run_line, table_of


class Sweep:
    """Runs jobs and keeps what came of them.

    Args:
        full_error: what the user set :data:`~harness.basics.errors.FULL_ERROR` to, for the jobs.

    Attributes:
        jobs: what was run, in order.
        fixed: the keys that all jobs have from the command line; the others are what the sweep varies.
        expected: how many jobs there will be.
        composed: the config without what is varied; set by Hydra's launcher, as is ``compose``.
        compose: returns the config of a command line.
    """

    def __init__(self, full_error: str | None) -> None:
        self.jobs: list[SweepJob] = []
        self.fixed: set[str] = set()
        self.composed: DictConfig | None = None
        self.compose: Callable[[list[str]], DictConfig] | None = None
        self.expected = 0
        self.full_error = full_error
        self.screen: Console = console()
        if not self.screen.is_terminal:
            self.screen.width = FILE_WIDTH  # where there is room, no cell of the table need be broken
        self.results_dir = ""
        self._done: dict[str, list[SweepRun]] | None = None

    def plan(self, jobs: int, fixed: set[str]) -> None:
        """Takes note of how many jobs there will be at least, and which keys they have in common."""
        self.expected, self.fixed = max(self.expected, jobs), fixed

    def say(self, line: str) -> None:
        """Prints a line as it is; a terminal wraps it, a file keeps it whole."""
        self.screen.print("\n".join(map(printable, line.split("\n"))), markup=False, soft_wrap=True)

    def run(self, overrides: list[str], composed: DictConfig, varied: list[str] | None = None) -> SweepJob:
        """Runs one job as often as its config's ``repeat`` says; with ``sweep.resume``, what is not done yet.

        Args:
            varied: the overrides that tell it from the others; None for those whose keys are not :attr:`fixed`.

        Raises:
            KeyboardInterrupt: the user ended a run; the job is in :attr:`jobs` with what it has.
            UserError: the results cannot be written, or the jobs are to resume a run.
        """
        if composed.resume is not None:
            found = f"{quoted(composed.resume)} is one run, not the jobs of a sweep"
            raise UserError("resume", found, "leave out -m and the keys with several values")
        self.results_dir = str(composed.results_dir)
        if varied is None:
            varied = [word for word in overrides if word.partition("=")[0] not in self.fixed]
        job = SweepJob(len(self.jobs) + 1, overrides, varied)
        self.expected = max(self.expected, job.number)
        self.jobs.append(job)
        times = composed.repeat if isinstance(composed.repeat, int) and composed.repeat > 0 else 1
        done = self._ran_before(composed)
        job.runs = done[:times]
        self.say(f"[{job.number}/{self.expected}] {' '.join(varied) or 'as given'}")
        for run in job.runs:
            self.say(f"    {run_line(run)}")
        while len(job.runs) < times:
            run = self._launch(overrides, composed, f"run {len(job.runs) + 1} of {times}" if times > 1 else "")
            job.runs.append(run)
            self.say(f"    {run_line(run)}")
            if run.exit_status == INTERRUPTED:
                raise KeyboardInterrupt
            if run.status == "ok":
                done.append(replace(run, earlier=True))
            if run.status == "invalid":
                break  # it would be refused again
        return job

    def _launch(self, overrides: list[str], composed: DictConfig, which: str) -> SweepRun:
        started = time.monotonic()
        with Follower(self.screen, which, started) as follower:
            try:
                with full_error(self.full_error):
                    outcome = launcher.launch(composed, overrides, follower)
            except OmegaConfBaseException as error:
                return SweepRun("", "invalid", str(explain(error)), None, None, REFUSED)
            except UserError:  # no job can write its results any more
                self.show()
                raise
            except Exception as error:  # a defect of ours costs this job, not the sweep
                return SweepRun("", "failed", one_line(f"{type(error).__name__}: {error}"), None, None, 1)
        record = outcome.record
        return SweepRun(
            str(record.get("run_id")),
            str(record.get("status")),
            record.get("error"),
            record.get("total_tokens_per_s"),
            record.get("elapsed_s"),
            outcome.exit_status,
            simulated=bool(record.get("simulated")),
        )

    def _ran_before(self, composed: DictConfig) -> list[SweepRun]:
        """Returns the runs of this very job that are done: same config, dataset, kind of device and code."""
        if not composed.sweep.resume:
            return []
        try:
            job_hash = jobs.prepare(composed).job_hash
        except UserError:
            return []  # what is wrong with it, its row will say
        if self._done is None:
            self._done = finished_runs(self.results_dir)
        return self._done.setdefault(job_hash, [])

    def show(self) -> None:
        """Prints the table of all jobs, best first, and the errors of those that are not ok."""
        self.screen.print()
        self.screen.print(table_of(self.jobs))
        for job in self.jobs:
            for run in job.runs:
                if run.status != "ok":
                    self.say(f"job {job.number}: {run.status}: {run.error}")

    def conclude(self, interrupted: bool = False) -> int:
        """Shows the jobs, and says what to do about those that are not ok; returns the exit status."""
        self.show()
        failed = [job for job in self.jobs if not job.ok]
        self.screen.print()
        self.say(f"{len(self.jobs) - len(failed)} of {self.expected} jobs ok")
        if interrupted:
            self.say("interrupted; the same command with sweep.resume=true does the rest")
            return INTERRUPTED
        if failed:
            self.say("the same command with sweep.resume=true runs only those that are not")
        else:
            where = shlex.quote(str(Path(self.results_dir) / "runs.csv"))
            self.say(f"compare: python -m harness.compare {where}")
        return max((run.exit_status for job in self.jobs for run in job.runs), default=0)


def finished_runs(results_dir: str) -> dict[str, list[SweepRun]]:
    """Returns the runs in ``results_dir`` whose status is ok, by the ``job_hash`` of their record."""
    found: dict[str, list[SweepRun]] = {}
    if not (Path(results_dir) / "runs.csv").is_file():
        return found
    for row in read_rows(Path(results_dir) / "runs.csv"):
        try:
            record = read_record(results_dir, row["run_id"]) if row.get("status") == "ok" else None
        except UserError:  # the cell is no run id
            record = None
        if record is not None and record["status"] == "ok" and isinstance(record.get("job_hash"), str):
            rate, elapsed_s = record.get("total_tokens_per_s"), record.get("elapsed_s")
            simulated = bool(record.get("simulated"))
            run = SweepRun(row["run_id"], "ok", None, rate, elapsed_s, 0, earlier=True, simulated=simulated)
            found.setdefault(record["job_hash"], []).append(run)
    return found
