"""The one loop of passes: schedule, launch, wait. How far launching runs ahead of waiting is the runner's ``depth``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from harness.basics.clock import Clock
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import Runner, Wait
from harness.engines.fastgen.scheduler import Scheduler


class State(NamedTuple):
    """Of the scheduler once it has booked a pass, before the next one is scheduled."""

    running: int
    waiting: int
    kv_utilisation: float


@dataclass(slots=True)
class Computed:
    """A pass whose ids have come.

    Attributes:
        started_s, ended_s: by the clock; passes do not overlap, for the device has one at a time.
        finished: the sequences that it has finished, in the order of the batch.
        rows: tokens that it has given, without those after a wrong draft or after the end of their sequence.
        state: with depth 1, an end that only the ids tell is in the next pass's.
    """

    batch: RaggedBatch
    started_s: float
    ended_s: float
    finished: list[Sequence]
    rows: int
    state: State


@dataclass(slots=True)
class _Launched:
    """A pass that the device has, and whose ids nobody has waited for yet."""

    batch: RaggedBatch
    launched_s: float
    wait: Wait
    state: State


class Loop:
    """Brings the sequences of a scheduler to their ends.

    With depth 0 a pass is launched, waited for and booked before the next is scheduled. With depth 1 the next one is
    scheduled and launched first, so that the device has it when this one ends.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Clock) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self.under_way: deque[_Launched] = deque()
        self._ended_s = 0.0

    def passes(self, submit: Callable[[], None] = lambda: None) -> Iterator[Computed]:
        """Yields the passes as they end, until nothing is left.

        Args:
            submit: called before a pass is scheduled, to submit what has come meanwhile.
        """
        while True:
            while len(self.under_way) <= self.runner.depth:
                submit()
                if not self.scheduler.unfinished:
                    break
                self._launch()
            if not self.under_way:
                return
            yield self._collect()

    def _launch(self) -> None:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        for sequence in scheduler.preempted:
            self.runner.free(sequence)
        launched_s = self.clock()
        wait = self.runner.launch(batch)
        scheduler.launched(batch)
        self.under_way.append(_Launched(batch, launched_s, wait, self._state()))

    def _collect(self) -> Computed:
        scheduler = self.scheduler
        launched = self.under_way.popleft()
        batch = launched.batch
        token_ids = launched.wait()
        started_s, self._ended_s = max(launched.launched_s, self._ended_s), self.clock()
        unused = scheduler.unused_rows
        finished = scheduler.collect(batch, token_ids)
        for sequence in finished:
            self.runner.free(sequence)
        rows = len(token_ids) - (scheduler.unused_rows - unused)
        state = launched.state if self.under_way else self._state()
        return Computed(batch, started_s, self._ended_s, finished, rows, state)

    def _state(self) -> State:
        scheduler = self.scheduler
        blocks = scheduler.blocks
        return State(len(scheduler.running), len(scheduler.waiting), blocks.used / blocks.total)
