"""What a sweep shows: a line while a job runs, and the table at its end."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness.basics.clock import duration
from harness.basics.errors import one_line, printable
from harness.basics.terminal import REFRESH_S

FILE_WIDTH = 160
PLAIN_S = 60.0  # between two lines about a job where there is no terminal
TAIL_BYTES = 4096  # of a launch's output, to find its last line
RUN_CLOCK = re.compile(r"^ *\d+\.\d s +")  # see progress.Display


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a job; figures are None where they are not known.

    Attributes:
        earlier: it was done before, and its row taken for the result.
        simulated: no time of it was measured.
    """

    run_id: str
    status: str
    error: str | None
    tokens_per_s: float | None
    elapsed_s: float | None
    exit_status: int
    earlier: bool = False
    simulated: bool = False


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
    runs: list[SweepRun] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all runs are."""
        return all(run.status == "ok" for run in self.runs)

    @property
    def simulated(self) -> bool:
        """Whether a run of it is: no rate of its compares with a measured one."""
        return any(run.simulated for run in self.runs)

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
    if repeated:
        table.add_column("spread", justify="right")
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
        cells.append(f"{job.rate / best[job.simulated]:.0%}" if job.rate else "")
        cells.append("\n".join(run.run_id for run in job.runs))
        table.add_row(*cells, style=None if job.ok else "dim")
    return table


def spread(rates: Sequence[float]) -> str:
    """Returns the range of repeated figures, and its width as a share of their median."""
    if len(rates) < 2:
        return ""
    low, high = min(rates), max(rates)
    return f"{low:,.1f} to {high:,.1f} ({(high - low) / statistics.median(rates):.1%})"


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

    def __call__(self, log: Path) -> None:
        now = time.monotonic()
        if now - self.drawn < (PLAIN_S if self.live is None else REFRESH_S):
            return
        self.drawn = now
        # One clock: a run's lines begin with its own, which starts later.
        parts = ["   ", self.which, duration(now - self.started), RUN_CLOCK.sub("", _last_line(log))]
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
