"""Scores through the scheduler: contexts as prompts, and each target token as the decode step of a run would be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

from harness.engines.fastgen.runner import Runner
from harness.engines.fastgen.scheduler import Scheduler, Sequence
from harness.engines.scoring import Forced, Score, Scored, force, grouped


def score(
    runner: Runner,
    scheduler: Scheduler,
    items: Iterable[Scored],
    refusal: Callable[[Forced], str | None],
    lookahead: int,
) -> Iterator[Score]:
    """Yields a score an item as their sequences finish.

    Args:
        scheduler: one without stop ids, for nothing but the target's length ends a sequence.
        refusal: why an item cannot be computed, or None when it can.
        lookahead: most items taken before they can start.
    """
    intake, uids = grouped(items), count()
    active: dict[int, Forced] = {}
    more = True
    while True:
        while more and len(scheduler.waiting) < lookahead:
            taken = list(islice(intake, lookahead))
            more = len(taken) == lookahead
            for forced in taken:
                if reason := refusal(forced):
                    yield from forced.refused(reason)
                    continue
                uid = next(uids)
                active[uid] = forced
                scheduler.submit(Sequence(uid, list(forced.context), len(forced.context), len(forced.target)))
        if not scheduler.unfinished:
            return
        batch = scheduler.schedule()
        for sequence in scheduler.preempted:
            runner.free(sequence)
        logits = runner.logits(batch)
        tokens = force(logits, [active[chunk.sequence.uid] for chunk in batch.chunks if chunk.last])
        for sequence in scheduler.complete(batch, tokens):
            runner.free(sequence)
            yield from active.pop(sequence.uid).scores
