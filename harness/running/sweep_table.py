"""What a sweep shows: a line while a job runs, and the table at its end."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness.basics.clock import duration
from harness.basics.errors import one_line, printable
from harness.basics.intervals import CONFIDENCE, Interval, of_median, of_rounds
from harness.basics.terminal import REFRESH_S

FILE_WIDTH = 160
PLAIN_S = 60.0  # between two lines about a job where there is no terminal
TAIL_BYTES = 4096  # of a launch's output, to find its last line
MORE_RUNS = 8  # of a job whose clocks are short
LIKE = " ~"  # a rate of which the rounds do not show that it is another one than the best
RUN_CLOCK = re.compile(r"^ *\d+\.\d s +")  # see progress.Display


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a job; figures are None where they are not known.

    Attributes:
        earlier: it was done before, and its row taken for the result.
        simulated: no time of it was measured.
        round: the series of runs that it is of, and its round in it; runs of one round were neighbours.
    """

    run_id: str
    status: str
    error: str | None
    tokens_per_s: float | None
    elapsed_s: float | None
    exit_status: int
    earlier: bool = False
    simulated: bool = False
    round: tuple[str, int] | None = None


@dataclass(slots=True)
class SweepJob:
    """One job of a sweep, and its runs: one, or ``repeat``.

    Attributes:
        number: from 1.
        overrides: the command line that composes it.
        varied: the overrides among them that the sweep chose.
        composed: its config.
        times: how often it is to run.
        until: how wide the interval of its median may be, as a part of it, for it to run no more; None runs it on.
        least_s: what the clocks of its runs are to add up to, as far as :data:`MORE_RUNS` do.
        dropped: whether more runs of it would change nothing.
        before: the runs of this very job that are done, its own and those of others that are the same.
    """

    number: int
    overrides: list[str]
    varied: list[str]
    runs: list[SweepRun] = field(default_factory=list)
    composed: DictConfig | None = None
    times: int = 1
    until: float | None = None
    least_s: float = 0.0
    dropped: bool = False
    before: list[SweepRun] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it has run as often as it is to; one that was refused would be refused again.

        Where ``until`` decides, one that is not ok has no median to wait for.
        """
        if self.dropped or any(run.status == "invalid" for run in self.runs):
            return True
        if len(self.runs) >= self.times:
            return not (self.short(self.least_s) and len(self.runs) < self.times + MORE_RUNS)
        if self.until is None or not self.runs:
            return False
        return not self.ok or (self.interval is not None and self.interval.width <= self.until)

    def short(self, least_s: float) -> bool:
        """Whether the measured clocks of its runs add up to less than ``least_s``; one that is not ok has none."""
        clocks = [run.elapsed_s for run in self.runs if run.elapsed_s is not None and not run.simulated]
        return self.ok and bool(clocks) and sum(clocks) < least_s

    @property
    def ok(self) -> bool:
        """Whether it has runs, and all of them are."""
        return bool(self.runs) and all(run.status == "ok" for run in self.runs)

    @property
    def simulated(self) -> bool:
        """Whether a run of it is: no rate of its compares with a measured one."""
        return any(run.simulated for run in self.runs)

    @property
    def rates(self) -> list[float]:
        """Total tokens per second of the runs that are ok."""
        return [run.tokens_per_s for run in self.runs if run.status == "ok" and run.tokens_per_s is not None]

    @property
    def by_round(self) -> dict[Hashable, float]:
        """The :attr:`rates` by their rounds."""
        ran = {run.round: run.tokens_per_s for run in self.runs if run.status == "ok" and run.round is not None}
        return {place: rate for place, rate in ran.items() if rate is not None}

    @property
    def interval(self) -> Interval | None:
        """Where the median of :attr:`rates` lies; None of too few."""
        return of_median([rate for rate in self.rates if rate > 0])

    @property
    def rate(self) -> float:
        """The median of :attr:`rates`; 0 when a run is not ok, which no search mistakes for a good figure."""
        return statistics.median(self.rates) if self.ok and self.rates else 0.0


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """Returns overrides as values by key."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in overrides)}


def run_line(run: SweepRun) -> str:
    words = [run.status]
    if run.tokens_per_s and run.elapsed_s is not None:
        words.append(
            f"{run.tokens_per_s:,.1f} total tokens/s in {_seconds(run.elapsed_s)}" + " (simulated)" * run.simulated
        )
    words.append(run.run_id)
    if run.earlier:
        words.append("(ran before)")
    if run.status != "ok":
        words.append(one_line(run.error or "", 160))
    return "  ".join(word for word in words if word)


def _seconds(elapsed_s: float) -> str:
    return f"{elapsed_s:#.2g} s" if elapsed_s < 9.95 else duration(elapsed_s)


def table_of(sweep_jobs: list[SweepJob]) -> Table:
    """Returns the jobs, best first: what they varied, how they ended, their median rate and its spread.

    One that a search has asked for again, and whose runs another job has, is not shown.
    """
    runs_of = {tuple(run.run_id for run in job.runs) or job.number: job for job in reversed(sweep_jobs)}
    sweep_jobs = [job for job in sweep_jobs if job in runs_of.values()]
    best = {kind: max((j.rate for j in sweep_jobs if j.simulated is kind), default=0.0) for kind in (False, True)}
    mixed = len({job.simulated for job in sweep_jobs if job.rate}) > 1
    keys = list(dict.fromkeys(key for job in sweep_jobs for key in choices(job.varied)))
    repeated = any(len(job.runs) > 1 for job in sweep_jobs)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("job", justify="right")
    leaves = [key.rpartition(".")[2] for key in keys]
    for key, leaf in zip(keys, leaves, strict=True):
        table.add_column(printable(escape(leaf if leaves.count(leaf) == 1 else key)), overflow="fold")
    table.add_column("status")
    table.add_column("median tok/s" if repeated else "total tok/s", justify="right")
    intervals = any(job.interval for job in sweep_jobs)
    if repeated:
        table.add_column("spread", justify="right")
    if intervals:
        table.add_column(f"{CONFIDENCE:.0%} interval", justify="right")
    table.add_column("of best", justify="right")
    table.add_column("run", no_wrap=True)
    for job in sorted(sweep_jobs, key=lambda job: (job.simulated, -job.rate, job.number)):
        values = choices(job.varied)
        statuses = dict.fromkeys(run.status for run in job.runs)
        rates = job.rates
        cells = [
            str(job.number),
            *(printable(escape(values.get(key, ""))) for key in keys),
            (", ".join(statuses) or "not run") + " (simulated)" * (mixed and job.simulated),
        ]
        cells.append(f"{statistics.median(rates):,.1f}" if rates else "")
        if repeated:
            cells.append(spread(rates))
        if intervals:
            cells.append(interval_text(job.interval))
        cells.append(f"{job.rate / best[job.simulated]:.0%}{LIKE * like_the_best(job, sweep_jobs)}" if job.rate else "")
        cells.append("\n".join(run.run_id for run in job.runs))
        table.add_row(*cells, style=None if job.ok else "dim")
    return table


def spread(rates: Sequence[float]) -> str:
    """Returns the range of repeated figures, and its width as a share of their median."""
    if len(rates) < 2:
        return ""
    low, high = min(rates), max(rates)
    return f"{low:,.1f} to {high:,.1f} ({(high - low) / statistics.median(rates):.1%})"


def interval_text(interval: Interval | None) -> str:
    """Returns the ends of the interval of a rate, and its width as a share of the median; empty without one."""
    if interval is None:
        return ""
    return f"{interval.low:,.1f} to {interval.high:,.1f} ({interval.width:.1%})"


def like_the_best(job: SweepJob, sweep_jobs: Sequence[SweepJob]) -> bool:
    """Whether their rounds show no difference between a job and the best one; False where there are too few."""
    best = max((one for one in sweep_jobs if one.simulated is job.simulated), key=lambda one: one.rate)
    ratio = of_rounds(job.by_round, best.by_round) if job is not best else None
    return ratio is not None and not ratio.clear


class Follower:
    """Shows how long a launch has been going on, and the last line that it printed.

    On a terminal in one line that changes, elsewhere in a new one from time to time.
    """

    def __init__(self, screen: Console, which: str, started: float) -> None:
        self.screen, self.which, self.started, self.drawn = screen, which, started, started
        self.live = Live(console=screen, auto_refresh=False, transient=True) if screen.is_terminal else None

    def __enter__(self) -> Follower:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, log: Path, state: str = "") -> None:
        """Shows the last line of ``log``, behind what is said of the ``state``."""
        now = time.monotonic()
        if now - self.drawn < (PLAIN_S if self.live is None else REFRESH_S):
            return
        self.drawn = now
        # One clock: a run's lines begin with its own, which starts later.
        parts = ["   ", self.which, duration(now - self.started), state, RUN_CLOCK.sub("", last_line(log))]
        line = Text(" ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")
        if self.live is None:
            self.screen.print(line)
        else:
            self.live.update(line, refresh=True)


def last_line(path: Path) -> str:
    """Returns the last line of a log that says something, in 200 characters; empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return one_line(next((line for line in reversed(lines) if line.strip()), ""), 200)
