"""The passes of a list of requests on a virtual clock: FastGen's own scheduler over a model of how long a pass takes.

No device, no files, and of tokens only prompts that share blocks: ``engine=simulate`` writes down what comes out of it,
and ``harness.plan`` changes one cause at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from harness.costs.work import PassWork
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks, SharedKvBlocks
from harness.models.ends import Ends

ENGINE = "fastgen"  # whose scheduler it is
STOP, OTHER = 1, 0  # the only ids of outputs that the scheduler is shown
ENDS = Ends(frozenset({STOP}))


class Times(Protocol):
    """How long a pass takes, and what lies between two passes; ``costs.pass_time.PassTime`` is one."""

    def seconds(self, work: PassWork) -> float:
        """Returns the seconds of a pass."""

    def host_seconds(self, work: PassWork, finished: int, admitted_tokens: int) -> float:
        """Returns the seconds before a pass in which the device waits for its host.

        Args:
            work: of the pass that is scheduled.
            finished: sequences that the pass before has finished, to be detokenized and written.
            admitted_tokens: of the prompts that were tokenized since the pass before.
        """


class Item(NamedTuple):
    """A request.

    Attributes:
        output_tokens, max_new_tokens: where it really ends, and where it would at the latest.
        prompt_ids: of which beginnings may be shared; None where they are not known, and nothing is shared.
    """

    uid: int
    prompt_tokens: int
    max_new_tokens: int
    output_tokens: int
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What the requests run on.

    Attributes:
        token_budget, max_sequences: most tokens in a pass, most sequences running at a time, of a replica.
        block_size, blocks: tokens in a block of the KV cache, and the blocks of a replica.
        replicas: that pull from one queue.
        lookahead: requests that a replica takes at a time, before they can start.
        slow: by replica, the factor on its time; those that are not named have 1.
        started_s: the clock at the beginning.
        prefix_sharing: whether prompts that begin alike share blocks.
    """

    token_budget: int
    max_sequences: int
    block_size: int
    blocks: int
    replicas: int = 1
    lookahead: int = 256
    slow: tuple[float, ...] = ()
    started_s: float = 0.0
    prefix_sharing: bool = False


class Pass(NamedTuple):
    """A pass of a replica; ``waiting``, ``running`` and ``kv_utilisation`` (0 to 1) are those once it is booked."""

    replica: int
    started_s: float
    seconds: float
    work: PassWork
    kv_utilisation: float
    waiting: int
    running: int


class Finished(NamedTuple):
    """A request that has come to its end; times in seconds of the clock, ``shared_tokens`` of its prompt not fed."""

    replica: int
    uid: int
    first_token_s: float
    finished_s: float
    output_tokens: int
    finish_reason: str
    shared_tokens: int = 0


class Rejected(NamedTuple):
    """A request that the KV cache could never hold."""

    replica: int
    uid: int
    finished_s: float
    reason: str


Event = Pass | Finished | Rejected


class Replica:
    """One replica: its scheduler, its clock, and what it adds up to."""

    def __init__(self, number: int, setup: Setup, times: Times) -> None:
        self.number = number
        self.times = times
        self.factor = setup.slow[number] if number < len(setup.slow) else 1.0
        self.lookahead = setup.lookahead
        blocks = (SharedKvBlocks if setup.prefix_sharing else KvBlocks)(setup.blocks, setup.block_size)
        self.scheduler = Scheduler(setup.token_budget, min(setup.max_sequences, setup.token_budget), blocks, ENDS)
        self.clock_s = setup.started_s
        self.ended_s = setup.started_s  # of its last pass, or of its last look at the queue
        self.steps = self.tokens = 0
        self._more = True
        self._finished_before = 0
        self._first_token_s: dict[int, float] = {}
        self._ends: dict[int, int] = {}  # by request that ends early, the length at which the next token is its last

    def step(self, queue: Iterator[Item]) -> list[Event]:
        """Takes requests and runs a pass; empty once there is nothing left for this replica."""
        events: list[Event] = []
        admitted = self._take(queue, events)
        scheduler = self.scheduler
        if not scheduler.unfinished:
            self.ended_s = self.clock_s
            return events
        batch = scheduler.schedule()
        work = batch.work
        started = self.clock_s + self.factor * self.times.host_seconds(work, self._finished_before, admitted)
        seconds = self.factor * self.times.seconds(work)
        self.clock_s = ended = started + seconds
        finished = scheduler.complete(batch, self._next_tokens(batch, work.logit_rows))
        for sequence, _, _, last in batch.chunks[batch.decode_tokens :]:
            if last:
                self._first_token_s.setdefault(sequence.uid, ended)
        self.steps += 1
        self.tokens += work.tokens
        self._finished_before = len(finished)
        blocks = scheduler.blocks
        used = blocks.used / blocks.total
        events.append(Pass(self.number, started, seconds, work, used, len(scheduler.waiting), len(scheduler.running)))
        for sequence in finished:
            self._ends.pop(sequence.uid, None)
            first, tokens = self._first_token_s.pop(sequence.uid), len(sequence.tokens) - sequence.prompt_len
            reason = sequence.finish_reason or "length"
            events.append(Finished(self.number, sequence.uid, first, ended, tokens, reason, sequence.shared or 0))
        return events

    def _next_tokens(self, batch: RaggedBatch, rows: int) -> list[int]:
        if not (ends := self._ends):
            return [OTHER] * rows
        return [STOP if ends.get(chunk[0].uid) == len(chunk[0].tokens) else OTHER for chunk in batch.chunks if chunk[3]]

    def _take(self, queue: Iterator[Item], events: list[Event]) -> int:
        """Takes requests as FastGen's loop does; returns how many prompt tokens they have."""
        scheduler, admitted = self.scheduler, 0
        while self._more and scheduler.hungry(self.lookahead):
            taken = list(islice(queue, self.lookahead))
            self._more = len(taken) == self.lookahead
            for uid, prompt_tokens, max_new_tokens, output_tokens, prompt_ids in taken:
                admitted += prompt_tokens
                reason = scheduler.refusal(prompt_tokens, max_new_tokens)
                if reason:
                    events.append(Rejected(self.number, uid, self.clock_s, reason))
                    continue
                if output_tokens < max_new_tokens:  # else the scheduler itself ends it
                    self._ends[uid] = prompt_tokens + output_tokens - 1
                # Prompts that are not known share nothing: each consists of an id that no other has.
                tokens = [-1 - uid] * prompt_tokens if prompt_ids is None else list(prompt_ids)
                scheduler.submit(Sequence(uid, tokens, prompt_tokens, max_new_tokens))
        return admitted


class Replay:
    """Replicas that pull from one queue, the one with the earliest clock first.

    Args:
        items: in the order in which they are handed out.
    """

    def __init__(self, items: Iterable[Item], setup: Setup, times: Times) -> None:
        self.replicas = [Replica(number, setup, times) for number in range(setup.replicas)]
        self._queue = iter(items)

    def __iter__(self) -> Iterator[Event]:
        """Yields each replica's passes in order, and all ends in the order of their times."""
        clocks = [(replica.clock_s, replica.number) for replica in self.replicas]
        ends: list[tuple[float, int, Finished | Rejected]] = []
        count = 0
        while clocks:
            now, number = heapq.heappop(clocks)
            while ends and ends[0][0] <= now:
                yield heapq.heappop(ends)[2]
            replica = self.replicas[number]
            events = replica.step(self._queue)
            for event in events:
                if isinstance(event, Pass):
                    heapq.heappush(clocks, (replica.clock_s, number))
                    yield event
                else:
                    count += 1
                    heapq.heappush(ends, (event.finished_s, count, event))
        while ends:
            yield heapq.heappop(ends)[2]


def replay(items: Iterable[Item], setup: Setup, times: Times) -> Iterator[Event]:
    """Yields what happens to ``items``: see :class:`Replay`."""
    return iter(Replay(items, setup, times))
