"""What a person sees: progress while the run goes on, and the summary at its end."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.basics.clock import Clock, duration
from harness.basics.terminal import PLAIN_S, REFRESH_S
from harness.engines.base import Progress as EngineProgress
from harness.workload.records import Completion

PACE_S = 20.0  # how far back the pace is taken from
FORESEEN = 0.25  # of the predicted time, within which the prediction is nearer than the pace


class Display:
    """Live progress: a bar on a terminal, a plain line every few seconds elsewhere.

    Drawn from the engine's own thread between two passes, so that no second thread disturbs the measurement.

    Args:
        estimates: for each request, by index, about how many prompt and output tokens it has; for the time left.
        before: further requests, which are done already.
        foreseen_s: seconds that the run is predicted to take, for the time left until the pace is known.
    """

    def __init__(
        self, screen: Console, estimates: dict[int, int], before: int = 0, foreseen_s: float | None = None
    ) -> None:
        self.screen = screen
        self.estimates = estimates
        self.requests = len(estimates) + before
        self.expected_tokens = sum(estimates.values())
        self.finished = before
        self.foreseen_s = foreseen_s if not before else None
        self.elsewhere_tokens = 0  # finished on other ranks
        self.recent: deque[tuple[float, int]] = deque()
        self.started = self.drawn = time.perf_counter()
        self.bar: Progress | None = None
        self.clock: Clock | None = None
        self.clock_from_s = 0.0

    def follow(self, clock: Clock) -> None:
        """Takes the rate from a simulated clock, not from the time here."""
        self.clock, self.clock_from_s = clock, clock()

    def __enter__(self) -> Display:
        self.started = self.drawn = time.perf_counter()
        if self.screen.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self.screen,
                auto_refresh=False,
                transient=True,
            )
            self.task = self.bar.add_task("run", total=self.requests, state="")
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def request_done(self, completion: Completion, elsewhere: bool) -> None:
        """Counts one finished or rejected request, of this rank or from ``elsewhere``."""
        tokens = completion.prompt_tokens + completion.output_tokens
        self.finished += 1
        self.expected_tokens += tokens - self.estimates[completion.index]
        if elsewhere:
            self.elsewhere_tokens += tokens

    def update(self, progress: EngineProgress) -> None:
        """Draws the state, if the last drawing is long enough ago."""
        now = time.perf_counter()
        if now - self.drawn < (REFRESH_S if self.bar is not None else PLAIN_S):
            return
        self.drawn = now
        state = self._state(progress, now - self.started)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.finished, state=state)
            self.bar.refresh()
        else:
            self.screen.print(f"{now - self.started:7.1f} s  {self.finished}/{self.requests} requests  {state}")

    def _state(self, progress: EngineProgress, elapsed: float) -> str:
        tokens = progress.prompt_tokens + progress.output_tokens + self.elsewhere_tokens
        took = elapsed if self.clock is None else self.clock() - self.clock_from_s
        parts = [f"{tokens:,} tokens", f"{tokens / took if took else 0:,.0f} tok/s"]
        parts += [f"{took:,.1f} s simulated"] if self.clock is not None else []
        queued = max(self.requests - self.finished - progress.running, 0)  # other ranks' running ones among them
        parts.append(f"{progress.running} running, {queued} queued")
        if progress.kv_utilisation is not None:
            parts.append(f"KV {progress.kv_utilisation:.0%}")
        while len(self.recent) > 1 and elapsed - self.recent[0][0] > PACE_S:
            self.recent.popleft()
        since, before = self.recent[0] if self.recent else (0.0, 0)
        self.recent.append((elapsed, tokens))
        # At the recent pace: prompts go by much faster than the outputs at the end.
        if self.foreseen_s is not None and took < FORESEEN * self.foreseen_s:
            parts.append(f"about {duration(self.foreseen_s - took)} left")
        elif tokens > before:
            left = max(self.expected_tokens - tokens, 0) * (elapsed - since) / (tokens - before)
            parts.append(f"about {duration(left)} left")
        return "  ".join(parts)
