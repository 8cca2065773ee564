"""The run's clock: every request through the engines of all ranks, every completion booked on rank 0."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from harness.basics.clock import Clock
from harness.basics.errors import UserError
from harness.running.accounting import ModelFlops, PromptLengths
from harness.running.context import RunContext
from harness.running.loading import Loaded
from harness.running.progress import Display
from harness.workload.records import Completion, Request


class Delivery:
    """One rank's part of the clock.

    Attributes:
        done: the requests that have come back, in this segment of the run or an earlier one.
        twice: those that came back more than once.
        rejected, rejection: how many were rejected, and why the last one was.
        elapsed_s: the clock once rank 0 is through; None before.
        others: what the other ranks report at their end: ``rank``, ``elapsed_s``, ``statistics``,
            ``peak_memory_bytes``, ``telemetry``.
        claims, flops: what is counted of the completions; rank 0's.
    """

    def __init__(self, run: RunContext, loaded: Loaded) -> None:
        self.loaded = loaded
        self.done: set[int] = set()
        self.twice: set[int] = set()
        self.rejected = 0
        self.rejection: str | None = None
        self.elapsed_s: float | None = None
        self.others: list[dict[str, Any]] = []
        self.claims = PromptLengths({request.index: request.claimed_prompt_len for request in loaded.workload.requests})
        self.flops = ModelFlops(run.job, run.peak_flops)
        self._ids = {request.index: request.id for request in loaded.workload.requests if request.id is not None}
        self._run = run
        self._booking = threading.Lock()
        self._clock: Clock | None = None

    @property
    def clock_s(self) -> float | None:
        """The run's clock, stopped or not; None where it has not been started."""
        return self.elapsed_s if self.elapsed_s is not None or self._clock is None else self._clock()

    def deliver_all(self) -> None:
        """Runs every request that is not done yet.

        Raises:
            RankFailed: another rank cannot go on.
            UserError: a completion cannot be written.
        """
        requests = self.loaded.engine.arrange(self.loaded.workload.requests)
        already_s = self._resume()
        requests = [request for request in requests if request.index not in self.done]
        if self._run.rank.first:
            self._lead(requests, already_s)
        else:
            self._follow(requests, already_s)

    def _resume(self) -> float:
        """Books what earlier segments of a resumed run have done, and returns the seconds that they took."""
        run, completions, already_s = self._run, [], 0.0
        if run.recorder is not None:
            completions, already_s = run.recorder.done(), run.recorder.clock_s
        known = {request.index for request in self.loaded.workload.requests}
        for completion in completions:
            if completion.index not in known:
                raise UserError("resume", f"request {completion.index} is not in the dataset", "start a new run")
            self._book(completion)
        if run.replicas is not None:
            indices, already_s = run.replicas.share((sorted(self.done), already_s))
            self.done.update(indices)
        if self.done:
            run.say(f"resuming after {already_s:,.1f} s: {len(self.done)} requests are done")
        return already_s

    def _lead(self, requests: list[Request], already_s: float) -> None:
        """Runs rank 0's share, and receives what the others have done."""
        run, engine = self._run, self.loaded.engine
        estimates = {r.index: (r.claimed_prompt_len or len(r.prompt) // 3) + (r.output_len or 0) for r in requests}
        with Display(run.screen, estimates, len(self.done), self.loaded.foreseen_s) as self._display:
            if run.recorder is not None:
                engine.on_pass = run.recorder.add_pass
            engine.on_progress = self._display.update
            mine: Iterator[Request] = iter(requests)
            if run.replicas is not None:
                run.replicas.receive(self._deliver)
                mine = run.replicas.take(requests)
                run.replicas.barrier()
            self._clock = clock = engine.clock(already_s)
            if run.job.simulated:
                self._display.follow(clock)
            elif run.recorder is not None:
                run.recorder.clock_started(clock())
            if run.telemetry is not None:
                run.telemetry.clock_started(clock)
            for completion in engine.generate(mine, clock):
                self._deliver(completion, elsewhere=False)
            self.elapsed_s = clock()
            others = run.replicas.wait() if run.replicas is not None else {}
            self.others = [{"rank": rank, **found} for rank, found in sorted(others.items())]
            if run.telemetry is not None:
                run.telemetry.stop()

    def _deliver(self, completion: Completion, elsewhere: bool = True) -> None:
        """Writes and books a completion; another rank's come through a thread."""
        run = self._run
        with self._booking:
            assert run.recorder is not None
            if run.replicas is not None and not elsewhere:
                run.replicas.check()
            completion.id = self._ids.get(completion.index)
            run.recorder.add(completion)
            self._book(completion)
            self._display.request_done(completion, elsewhere)

    def _book(self, completion: Completion) -> None:
        self.claims.add(completion)
        self.flops.add(completion)
        if completion.index in self.done:
            self.twice.add(completion.index)
        self.done.add(completion.index)
        if completion.finish_reason == "rejected":
            self.rejected += 1
            self.rejection = completion.error

    def _follow(self, requests: list[Request], already_s: float) -> None:
        """Runs this rank's share and sends all of it to rank 0, or computes along with its model's leader."""
        run, engine = self._run, self.loaded.engine
        assert run.replicas is not None
        leads = engine.settings.leads
        run.replicas.barrier()
        clock = engine.clock(already_s)
        if run.telemetry is not None:
            run.telemetry.clock_started(clock)
        if leads:
            for completion in engine.generate(run.replicas.take(requests), clock):
                run.replicas.send(completion)
        else:
            engine.follow()
        elapsed_s = clock()
        figures: dict[str, Any] = {
            "elapsed_s": elapsed_s,
            "statistics": dataclasses.asdict(engine.statistics) if leads else None,
            "peak_memory_bytes": engine.peak_memory_bytes(),
        }
        if run.telemetry is not None:
            run.telemetry.stop()
            figures["telemetry"] = run.telemetry.summary(elapsed_s)
            if run.job.config.power_limit_w is not None:
                figures["power"] = run.telemetry.power()
        run.replicas.finish(figures)
