"""Many runs, one after another: the jobs of a sweep, and the repetitions of a config.

Each is a ``deepspeed`` launch of its own: the number of ranks can change from one to the next, device memory and
process groups start fresh, and one that crashes or hangs is a row with its status while the others go on.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from harness.basics.errors import INTERRUPTED, REFUSED, UserError, full_error, one_line, printable, quoted
from harness.basics.terminal import console
from harness.config.checks import repeat_until
from harness.config.explain import explain
from harness.results.directory import new_run_id, read_record, round_of
from harness.results.table import read_rows
from harness.running import again, launcher
from harness.running import job as jobs
from harness.running.sweep_table import (
    FILE_WIDTH,
    LIKE,
    Follower,
    SweepJob,
    SweepRun,
    like_the_best,
    run_line,
    table_of,
)

SHORT_S = 3.0
MOST_RUNS = 30  # of a job with repeat_until and no bound of the user's

if TYPE_CHECKING:
    from harness.running.slurm.jobs import SlurmJobs


class Sweep:
    """Runs jobs and keeps what came of them.

    Args:
        full_error: what the user set :data:`~harness.basics.errors.FULL_ERROR` to, for the jobs.

    Attributes:
        jobs: what was run, in order.
        fixed: the keys that all jobs have from the command line; the others are what the sweep varies.
        expected: how many jobs there will be.
        series: what the records of its runs call it.
        round: how often the jobs have had their turn.
        composed: the config without what is varied; set by Hydra's launcher, as is ``compose``.
        compose: returns the config of a command line.
        elsewhere: where the jobs run if that is not this machine; set by Hydra's launcher.
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
        self.series = new_run_id("series")
        self.round = 0
        self.elsewhere: SlurmJobs | None = None
        self._continued = False
        self._done: dict[str, list[SweepRun]] | None = None

    def plan(self, jobs: int, fixed: set[str]) -> None:
        """Takes note of how many jobs there will be at least, and which keys they have in common."""
        self.expected, self.fixed = max(self.expected, jobs), fixed

    def continue_series(self, name: str) -> None:
        """Goes on with a series that an earlier process may have begun: of what ran before, its runs alone count."""
        self.series, self._continued = name, True

    def say(self, line: str) -> None:
        """Prints a line as it is; a terminal wraps it, a file keeps it whole."""
        self.screen.print("\n".join(map(printable, line.split("\n"))), markup=False, soft_wrap=True)

    def add(self, overrides: list[str], composed: DictConfig, varied: list[str] | None = None) -> SweepJob:
        """Takes up one job, which is to run as often as its config's ``repeat`` and ``repeat_until`` say.

        Args:
            varied: the overrides that tell it from the others; None for those whose keys are not :attr:`fixed`.

        Raises:
            UserError: the jobs are to resume a run, or ``repeat_until`` is no share.
        """
        if composed.resume is not None:
            found = f"{quoted(composed.resume)} is one run, not the jobs of a sweep"
            raise UserError("resume", found, "leave out -m and the keys with several values")
        self.results_dir = str(composed.results_dir)
        if varied is None:
            varied = self.varied(overrides)
        times = composed.repeat if isinstance(composed.repeat, int) and composed.repeat > 0 else 1
        job = SweepJob(len(self.jobs) + 1, overrides, varied, composed=composed, times=times)
        job.until, job.least_s = repeat_until(composed.repeat_until), composed.sweep.least_s
        if job.until is not None and times == 1:
            job.times = MOST_RUNS
        self.expected = max(self.expected, job.number)
        job.before = self._ran_before(composed)
        self.jobs.append(job)
        return job

    def varied(self, overrides: Sequence[str]) -> list[str]:
        """Returns those of a job's overrides that tell it from the others."""
        return [word for word in overrides if word.partition("=")[0] not in self.fixed]

    def run(self, jobs: Sequence[SweepJob], after_round: Callable[[], None] | None = None) -> None:
        """Runs jobs in rounds, each job once a round, until each is finished.

        So what a machine does in the course of an hour meets all of them alike; and as every other round goes
        backwards, so does what it does in the course of a round.

        Args:
            after_round: called whenever each has had its turn.

        Raises:
            KeyboardInterrupt: the user ended a run; the job has it.
            UserError: the results cannot be written.
        """
        if self.elsewhere is not None:
            with full_error(self.full_error):
                self.elsewhere.submit(jobs)
        headed: SweepJob | None = None
        while waiting := [job for job in jobs if not job.finished]:
            self.round += 1
            for job in waiting if self.round % 2 else reversed(waiting):
                if job is not headed:
                    self.say(self._heading(job))
                self._run_once(job)
                headed = job
            if after_round is not None:
                after_round()

    def _heading(self, job: SweepJob) -> str:
        words = [f"[{job.number}/{self.expected}] {' '.join(job.varied) or 'as given'}"]
        return ", ".join(words + [f"run {len(job.runs) + 1}"] * bool(job.runs))

    def _run_once(self, job: SweepJob) -> None:
        """Runs a job, or takes what it or another that is the same was found to do before."""
        ok = sum(run.status == "ok" for run in job.runs)
        if ok < len(job.before):
            job.runs.append(job.before[ok])
            self.say(f"    {run_line(job.runs[-1])}")
            return
        assert job.composed is not None
        most = "at most " * (job.until is not None)
        which = f"run {len(job.runs) + 1} of {most}{max(job.times, len(job.runs) + 1)}"
        which = which if job.times > 1 or job.runs else ""
        run = self._launch(job, which)
        job.runs.append(run)
        self.say(f"    {run_line(run)}")
        if run.exit_status == INTERRUPTED:
            raise KeyboardInterrupt
        if run.status == "ok":
            job.before.append(replace(run, earlier=True))

    def _launch(self, job: SweepJob, which: str) -> SweepRun:
        assert job.composed is not None
        started, place = time.monotonic(), (self.series, self.round)
        with Follower(self.screen, which, started) as follower:
            try:
                with full_error(self.full_error):
                    facts = {"round": {"series": self.series, "number": self.round, "varied": job.varied}}
                    launch = launcher.launch if self.elsewhere is None else self.elsewhere.launch
                    outcome = launch(job.composed, job.overrides, follower, facts)
            except OmegaConfBaseException as error:
                return SweepRun("", "invalid", str(explain(error)), None, None, REFUSED)
            except UserError:  # no job can write its results any more
                self.show()
                raise
            except Exception as error:  # a defect of ours costs this job, not the sweep
                return SweepRun("", "failed", one_line(f"{type(error).__name__}: {error}"), None, None, 1)
        return replace(run_of(outcome.record), exit_status=outcome.exit_status, round=place)

    def _ran_before(self, composed: DictConfig) -> list[SweepRun]:
        """Returns the runs of this very job that are done: same config, dataset, kind of device and code."""
        if not composed.sweep.resume:
            return []
        if self.elsewhere is not None:
            return self.elsewhere.ran_before(composed)
        if (job_hash := jobs.hash_of(composed)) is None:
            return []
        if self._done is None:
            self._done = finished_runs(self.results_dir, self.series if self._continued else None)
            last = [run.round[1] for runs in self._done.values() for run in runs if run.round and self._continued]
            self.round = max([self.round, *last])
        return self._done.setdefault(job_hash, [])

    def show(self) -> None:
        """Prints the table of all jobs, best first, and the errors of those that are not ok."""
        self.screen.print()
        self.screen.print(table_of(self.jobs))
        if any(like_the_best(job, self.jobs) for job in self.jobs):
            self.say(f"{LIKE.strip()} the rounds show no difference from the best")
        for job in self.jobs:
            for run in job.runs:
                if run.status != "ok":
                    self.say(f"job {job.number}: {run.status}: {run.error}")
            if job.until is not None and job.interval is not None and job.interval.width > job.until:
                wide = f"the interval of the median is {job.interval.width:.1%} wide after {len(job.runs)} runs"
                self.say(f"job {job.number}: {wide}, not within repeat_until={job.until:.3g}: raise repeat")

    def conclude(self, interrupted: bool = False) -> int:
        """Shows the jobs, and says what to do about those that are not ok; returns the exit status."""
        self.show()
        failed = [job for job in self.jobs if not (job.ok and job.finished)]
        self.screen.print()
        self.say(f"{len(self.jobs) - len(failed)} of {self.expected} jobs ok")
        if interrupted:
            self.say(f"interrupted; this does the rest:\n{again.resume_sweep()}")
            return INTERRUPTED
        if failed:
            self.say("the same command with sweep.resume=true runs only those that are not")
        else:
            if len(self.jobs) > 1 and any(not job.least_s and job.short(SHORT_S) for job in self.jobs):
                self.say(f"clocks of less than {SHORT_S:g} s tell little: sweep.least_s={SHORT_S:g} repeats such jobs")
            where = shlex.quote(str(Path(self.results_dir) / "runs.csv"))
            self.say(f"compare: python -m harness.compare {where}")
        return max((run.exit_status for job in self.jobs for run in job.runs), default=0)


def finished_runs(results_dir: str, series: str | None = None) -> dict[str, list[SweepRun]]:
    """Returns the runs in ``results_dir`` whose status is ok, by the ``job_hash`` of their record.

    Args:
        series: of it alone; None for all.
    """
    found: dict[str, list[SweepRun]] = {}
    if not (Path(results_dir) / "runs.csv").is_file():
        return found
    for row in read_rows(Path(results_dir) / "runs.csv"):
        try:
            record = read_record(results_dir, row["run_id"]) if row.get("status") == "ok" else None
        except UserError:  # the cell is no run id
            record = None
        if record is not None and record["status"] == "ok" and isinstance(record.get("job_hash"), str):
            run = replace(run_of({"run_id": row["run_id"], **record}), earlier=True)
            if series is None or (run.round is not None and run.round[0] == series):
                found.setdefault(record["job_hash"], []).append(run)
    return found


def run_of(record: dict[str, Any]) -> SweepRun:
    """Returns what a sweep keeps of a run, from its record; its exit status is another matter."""
    return SweepRun(
        str(record.get("run_id")),
        str(record.get("status")),
        record.get("error"),
        record.get("total_tokens_per_s"),
        record.get("elapsed_s"),
        0,
        simulated=bool(record.get("simulated")),
        round=round_of(record),
    )
