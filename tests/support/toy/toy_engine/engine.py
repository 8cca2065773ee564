"""The engine itself, which only a rank imports."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from harness.basics.clock import Clock
from harness.engines.base import Engine
from harness.models import tokenizer
from harness.workload.records import Completion, Request
from toy_engine.room import ToyConfig

LOOPS_PER_S = 3e7


class ToyEngine(Engine[ToyConfig]):
    """Says one token over and over."""

    @property
    def kernels(self) -> str:
        return "none"

    @property
    def provable(self) -> bool:
        return False

    def load(self) -> None:
        """Loads the tokenizer; there are no weights."""
        self.tokenizer = tokenizer.load_tokenizer(self.settings.source)

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def _work(self) -> None:
        """Works for what takes ``work_s`` on a quiet machine, and sleeps for its share of what it took."""
        began = time.perf_counter()
        for _ in range(int(self.settings.engine.work_s * LOOPS_PER_S)):
            pass
        if owed := self.settings.engine.added * (time.perf_counter() - began):
            time.sleep(owed)

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields ``output_len`` times the reply for each request."""
        for request in requests:
            (prompt,) = self.tokenize([request])
            self._work()
            ids = [self.settings.engine.reply] * (request.output_len or 1)
            yield self.completion(request.index, len(prompt), ids, "length", clock(), clock)
