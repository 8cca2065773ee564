"""Prompts into ids and ids into texts: by the engine's own thread, or by one beside it while passes run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Generic, TypeVar

from harness.engines.base import Engine
from harness.workload.records import Completion, Request

T = TypeVar("T")
Prompts = list[tuple[Request, list[int]]]


class _Due(Generic[T]):
    """A future without a thread: the work is done when its result is asked for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.result = work

    def done(self) -> bool:
        """Whether asking for the result costs no waiting for others."""
        return True


class Texts:
    """The requests of a run as ids, in portions, and its completions with their texts.

    One thread does both, for a tokenizer must not be used by two at a time. Requests are pulled by the engine's thread:
    what is behind them need not bear another.

    Args:
        engine: whose tokenizer it is, and in whose statistics the time is booked.
        portion: requests that are taken at a time.
        beside: whether to have a thread; it then tokenizes a portion ahead.
        idle: whether no pass is under way, which would hide the time.
    """

    def __init__(
        self, engine: Engine, requests: Iterable[Request], portion: int, beside: bool, idle: Callable[[], bool]
    ) -> None:
        self.more = True  # whether take() may have something
        self._engine = engine
        self._requests = iter(requests)
        self._portion = portion
        self._worker = ThreadPoolExecutor(1, "texts") if beside else None
        self._idle = idle
        self._drained = False
        self._next: Future[Prompts] | _Due[Prompts] | None = None
        self._completions: deque[Future[Completion] | _Due[Completion]] = deque()

    def __enter__(self) -> Texts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Ends the thread, with the piece of work that it is at."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def take(self) -> Prompts:
        """Returns the next portion, tokenized; ``more`` says whether there is another."""
        portion = self._next or self._begin()
        self._next = None
        started = time.perf_counter()
        prompts = portion.result()
        if self._idle():
            self._engine.statistics.tokenize_s += time.perf_counter() - started
        if self._worker is not None and not self._drained:
            self._next = self._begin()
        self.more = self._next is not None or not self._drained
        return prompts

    def _begin(self) -> Future[Prompts] | _Due[Prompts]:
        requests = list(islice(self._requests, self._portion))
        self._drained = len(requests) < self._portion
        return self._begun(lambda: list(zip(requests, self._engine.encode(requests), strict=True)))

    def add(self, completion: Completion) -> None:
        """Puts a completion that has all it needs behind those that are being made."""
        self._completions.append(_Due(lambda: completion))

    def make(self, complete: Callable[[], Completion]) -> None:
        """Has a completion made, behind those that came before."""
        self._completions.append(self._begun(complete))

    def ready(self, wait: bool = False) -> Iterator[Completion]:
        """Yields the completions that are made, in order; with ``wait``, all of them."""
        waiting = self._completions
        while waiting and (wait or waiting[0].done()):
            started = time.perf_counter()
            completion = waiting.popleft().result()
            if self._idle():
                self._engine.statistics.detokenize_s += time.perf_counter() - started
            yield completion

    def _begun(self, work: Callable[[], T]) -> Future[T] | _Due[T]:
        return _Due(work) if self._worker is None else self._worker.submit(work)
