"""Many runs, one after another: the jobs of a sweep, and the repetitions of a config.

Each is a ``deepspeed`` launch of its own: the number of ranks can change from one to the next, device memory and
process groups start fresh, and one that crashes or hangs is a row with its status while the others go on.
"""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness import job as jobs
from harness import launcher
from harness.display import REFRESH_S, console, duration
from harness.errors import INTERRUPTED, REFUSED, UserError, full_error, one_line, printable, quoted
from harness.explain import explain
from harness.results import read_record
from harness.runs_table import read_rows

FILE_WIDTH = 160
PLAIN_S = 60.0  # between two lines about a job where there is no terminal
TAIL_BYTES = 4096  # of a launch's output, to find its last line


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job; figures are None where they are not known.

    Attributes:
        earlier: it was done before, and its row taken for the result.
    """

    run_id: str
    status: str
    error: str | None
    tokens_per_s: float | None
    elapsed_s: float | None
    exit_status: int
    earlier: bool = False


@dataclass(slots=True)
class SweepJob:
    """One job of a sweep, and its runs: one, or ``repeat``.

    Attributes:
        number: from 1.
        overrides: the command line that composes it.
        varied: the overrides among them that the sweep chose.
    """

    number: int
    overrides: list[str]
    varied: list[str]
    runs: list[Run] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all runs are."""
        return all(run.status == "ok" for run in self.runs)

    @property
    def rates(self) -> list[float]:
        """Total tokens per second of the runs that are ok."""
        return [run.tokens_per_s for run in self.runs if run.status == "ok" and run.tokens_per_s is not None]

    @property
    def rate(self) -> float:
        """The median of :attr:`rates`; 0 when a run is not ok, which no search mistakes for a good figure."""
        return statistics.median(self.rates) if self.ok and self.rates else 0.0


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """Returns overrides as values by key."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in overrides)}


def without_hydra(composed: DictConfig) -> DictConfig:
    """Returns a config without Hydra's own part, as a job sees it."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


class Sweep:
    """Runs jobs and keeps what came of them. One process drives one: :data:`SWEEP`.

    Attributes:
        jobs: what was run, in order.
        fixed: the keys that all jobs have from the command line; the others are what the sweep varies.
        expected: how many jobs there will be.
        composed: the config without what is varied; set by Hydra's launcher, as is ``compose``.
        compose: returns the config of a command line.
        full_error: what the user set :data:`~harness.errors.FULL_ERROR` to, for the jobs.
    """

    def __init__(self) -> None:
        self.jobs: list[SweepJob] = []
        self.fixed: set[str] = set()
        self.composed: DictConfig | None = None
        self.compose: Callable[[list[str]], DictConfig] | None = None
        self.expected = 0
        self.full_error: str | None = None
        self.screen: Console = console()
        if not self.screen.is_terminal:
            self.screen.width = FILE_WIDTH  # where there is room, no cell of the table need be broken
        self.results_dir = ""
        self._done: dict[str, list[Run]] | None = None

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
            self.say(f"    {_line(run)}")
        while len(job.runs) < times:
            run = self._launch(overrides, composed, f"run {len(job.runs) + 1} of {times}" if times > 1 else "")
            job.runs.append(run)
            self.say(f"    {_line(run)}")
            if run.exit_status == INTERRUPTED:
                raise KeyboardInterrupt
            if run.status == "ok":
                done.append(replace(run, earlier=True))
            if run.status == "invalid":
                break  # it would be refused again
        return job

    def _launch(self, overrides: list[str], composed: DictConfig, which: str) -> Run:
        started = time.monotonic()
        with _Follower(self.screen, which, started) as follower:
            try:
                with full_error(self.full_error):
                    outcome = launcher.launch(composed, overrides, follower)
            except OmegaConfBaseException as error:
                return Run("", "invalid", str(explain(error)), None, None, REFUSED)
            except UserError:  # no job can write its results any more
                self.show()
                raise
            except Exception as error:  # a defect of ours costs this job, not the sweep
                return Run("", "failed", one_line(f"{type(error).__name__}: {error}"), None, None, 1)
        record = outcome.record
        return Run(
            str(record.get("run_id")),
            str(record.get("status")),
            record.get("error"),
            record.get("total_tokens_per_s"),
            record.get("elapsed_s"),
            outcome.exit_status,
        )

    def _ran_before(self, composed: DictConfig) -> list[Run]:
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
        self.screen.print(_table(self.jobs))
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


SWEEP = Sweep()


def finished_runs(results_dir: str) -> dict[str, list[Run]]:
    """Returns the runs in ``results_dir`` whose status is ok, by the ``job_hash`` of their record."""
    found: dict[str, list[Run]] = {}
    if not (Path(results_dir) / "runs.csv").is_file():
        return found
    for row in read_rows(Path(results_dir) / "runs.csv"):
        try:
            record = read_record(results_dir, row["run_id"]) if row.get("status") == "ok" else None
        except UserError:  # the cell is no run id
            record = None
        if record is not None and record["status"] == "ok" and isinstance(record.get("job_hash"), str):
            rate, elapsed_s = record.get("total_tokens_per_s"), record.get("elapsed_s")
            run = Run(row["run_id"], "ok", None, rate, elapsed_s, 0, earlier=True)
            found.setdefault(record["job_hash"], []).append(run)
    return found


def _line(run: Run) -> str:
    words = [run.status]
    if run.tokens_per_s and run.elapsed_s is not None:
        words.append(f"{run.tokens_per_s:,.1f} total tokens/s in {duration(run.elapsed_s)}")
    words.append(run.run_id)
    if run.earlier:
        words.append("(ran before)")
    if run.status != "ok":
        words.append(one_line(run.error or "", 160))
    return "  ".join(word for word in words if word)


def _table(sweep_jobs: list[SweepJob]) -> Table:
    """Returns the jobs, best first: what they varied, how they ended, their median rate and its spread.

    One that a search has asked for again, and whose runs another job has, is not shown.
    """
    runs_of = {tuple(run.run_id for run in job.runs) or job.number: job for job in reversed(sweep_jobs)}
    sweep_jobs = [job for job in sweep_jobs if job in runs_of.values()]
    best = max((job.rate for job in sweep_jobs), default=0.0)
    keys = list(dict.fromkeys(key for job in sweep_jobs for key in choices(job.varied)))
    repeated = any(len(job.runs) > 1 for job in sweep_jobs)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("job", justify="right")
    leaves = [key.rpartition(".")[2] for key in keys]
    for key, leaf in zip(keys, leaves, strict=True):
        table.add_column(printable(escape(leaf if leaves.count(leaf) == 1 else key)), overflow="fold")
    table.add_column("status")
    table.add_column("median tok/s" if repeated else "total tok/s", justify="right")
    if repeated:
        table.add_column("spread", justify="right")
    table.add_column("of best", justify="right")
    table.add_column("run", no_wrap=True)
    for job in sorted(sweep_jobs, key=lambda job: (-job.rate, job.number)):
        values = choices(job.varied)
        statuses = dict.fromkeys(run.status for run in job.runs)
        rates = job.rates
        cells = [
            str(job.number),
            *(printable(escape(values.get(key, ""))) for key in keys),
            ", ".join(statuses) or "not run",
        ]
        cells.append(f"{statistics.median(rates):,.1f}" if rates else "")
        if repeated:
            cells.append(spread(rates))
        cells.append(f"{job.rate / best:.0%}" if best and job.rate else "")
        cells.append("\n".join(run.run_id for run in job.runs))
        table.add_row(*cells, style=None if job.ok else "dim")
    return table


def spread(rates: Sequence[float]) -> str:
    """Returns the range of repeated figures, and its width as a share of their median."""
    if len(rates) < 2:
        return ""
    low, high = min(rates), max(rates)
    return f"{low:,.1f} to {high:,.1f} ({(high - low) / statistics.median(rates):.1%})"


class _Follower:
    """Shows how long a launch has been going on, and the last line that it printed.

    On a terminal in one line that changes, elsewhere in a new one from time to time.
    """

    def __init__(self, screen: Console, which: str, started: float) -> None:
        self.screen, self.which, self.started, self.drawn = screen, which, started, started
        self.live = Live(console=screen, auto_refresh=False, transient=True) if screen.is_terminal else None

    def __enter__(self) -> _Follower:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, log: Path) -> None:
        now = time.monotonic()
        if now - self.drawn < (PLAIN_S if self.live is None else REFRESH_S):
            return
        self.drawn = now
        parts = ["   ", self.which, duration(now - self.started), _last_line(log)]
        line = Text(" ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")
        if self.live is None:
            self.screen.print(line)
        else:
            self.live.update(line, refresh=True)


def _last_line(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return one_line(next((line for line in reversed(lines) if line.strip()), ""), 200)
