"""All engines of a launch behind two calls: what rank 0 asks, its replicas share out among themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from harness.basics.clock import Clock
from harness.engines.base import Engine
from harness.engines.scoring import Score, Scored, grouped
from harness.ranks.replicas import Replicas
from harness.workload.records import Completion, Request

REPORT_S = 5.0
Result = TypeVar("Result", Score, Completion)


class Pool:
    """This rank's engine, and on rank 0 the way to all of them.

    Args:
        engine: loaded.
        replicas: the ranks of the launch, which have met; None for a lone one.
        prefill: score targets in prompt passes; see :meth:`Engine.score`.
        report: called every few seconds, on rank 0, with how many results its own replica has and will have.
    """

    def __init__(
        self,
        engine: Engine,
        replicas: Replicas | None = None,
        prefill: bool = False,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.engine = engine
        self.replicas = replicas
        self.prefill = prefill
        self._report = report or (lambda done, total: None)

    def score(self, items: Sequence[Scored]) -> list[Score]:
        """Returns one score an item, in their order; their indices must differ. Rank 0's.

        Raises:
            UserError: the engine cannot score.
        """
        groups = sorted(grouped(items), key=lambda forced: -len(forced.context) - len(forced.target))
        scores = self._ask("score", [list(forced.items) for forced in groups])
        by_index = {score.index: score for score in scores}
        return [by_index[item.index] for item in items]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Returns one completion a request, rejected ones included, in their order; their indices must differ."""
        longest_first = sorted(requests, key=lambda request: -(request.output_len or 0))
        completions = self._ask("generate", [[request] for request in longest_first])
        by_index = {completion.index: completion for completion in completions}
        return [by_index[request.index] for request in requests]

    def serve(self) -> None:
        """Computes what rank 0 asks for, until it closes the pool; the other ranks'."""
        assert self.replicas is not None
        while (asked := self.replicas.share()) is not None:
            self.replicas.gather(self._compute(*asked))

    def close(self) -> None:
        """Ends the other ranks' :meth:`serve`; rank 0's."""
        if self.replicas is not None:
            self.replicas.share(None)

    def _ask(self, what: str, groups: list[list]) -> list:
        if self.replicas is None:
            return self._compute(what, groups)
        self.replicas.share((what, groups))
        return [result for results in self.replicas.gather(self._compute(what, groups)) for result in results]

    def _compute(self, what: str, groups: list[list]) -> list:
        """Returns the results of this rank's share of ``groups``: every ``dp``-th, for they come longest first."""
        number, count = 0, 1
        if self.replicas is not None:
            rank, tp = self.replicas.rank, self.replicas.tp
            number, count = rank.rank // tp, rank.world // tp
        if not self.engine.settings.leads:
            self.engine.follow()
            return []
        mine = [item for group in groups[number::count] for item in group]
        if what == "score":
            return self._collect(self.engine.score(iter(mine), self.prefill), len(mine))
        return self._collect(self.engine.generate(iter(self.engine.arrange(mine)), Clock()), len(mine))

    def _collect(self, results: Iterable[Result], total: int) -> list[Result]:
        found: list[Result] = []
        reported = time.monotonic()
        for result in results:
            found.append(result)
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                self._report(len(found), total)
        return found
