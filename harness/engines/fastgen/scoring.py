"""Scores through the scheduler, in passes like those of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import Runner
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.scoring import Forced, Score, Scored, force, grouped


def score(
    runner: Runner,
    scheduler: Scheduler,
    items: Iterable[Scored],
    refusal: Callable[[Forced], str | None],
    lookahead: int,
    prefill: bool,
) -> Iterator[Score]:
    """Yields a score an item as their sequences finish.

    Args:
        scheduler: one without stop ids, for nothing but the target's length ends a sequence.
        refusal: why an item cannot be computed, or None when it can.
        lookahead: items taken at a time, before they can start.
        prefill: feed targets as a part of the prompt; the runner gives logits of every token.
    """
    intake, uids = grouped(items), count()
    active: dict[int, Forced] = {}
    more = True
    while True:
        while more and scheduler.hungry(lookahead):
            taken = list(islice(intake, lookahead))
            more = len(taken) == lookahead
            for forced in taken:
                if reason := refusal(forced):
                    yield from forced.refused(reason)
                    continue
                uid = next(uids)
                active[uid] = forced
                ids, steps = list(forced.context), len(forced.target)
                if prefill:
                    ids, steps = ids + forced.target[:-1], 1
                scheduler.submit(Sequence(uid, ids, len(ids), steps))
        if not scheduler.unfinished:
            return
        batch = scheduler.schedule()
        for sequence in scheduler.preempted:
            runner.free(sequence)
        tokens = _prefill(runner, batch, active) if prefill else _step(runner, batch, active)
        for sequence in scheduler.complete(batch, tokens):
            runner.free(sequence)
            yield from active.pop(sequence.uid).scores


def _step(runner: Runner, batch: RaggedBatch, active: dict[int, Forced]) -> list[int]:
    """Computes a pass and books the token that follows each ``last`` chunk; returns those tokens."""
    return force(runner.logits(batch), [active[sequence.uid] for sequence, _, _, last in batch.chunks if last])


def _prefill(runner: Runner, batch: RaggedBatch, active: dict[int, Forced]) -> list[int]:
    """Computes a pass and books every target token that follows one of its tokens; returns those after last chunks."""
    rows: list[int] = []
    whose: list[Forced] = []
    begin = 0
    for sequence, start, length, _ in batch.chunks:
        forced = active[sequence.uid]
        # The first score follows the context's last token; what was booked before a preemption stays.
        first = max(start, len(forced.context) - 1 + len(forced.logprobs))
        new = range(begin + first - start, begin + length)
        rows += new
        whose += [forced] * len(new)
        begin += length
    force(runner.logits(batch, rows), whose)
    return [active[sequence.uid].target[-1] for sequence, _, _, last in batch.chunks if last]
