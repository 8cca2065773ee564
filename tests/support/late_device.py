"""A stand-in for a device: it computes a pass after the call that launched it, on a thread of its own.

Ids stay on it as on a real one: a decode that begins with ``-(row + 1)`` takes the id that the pass before gave in
that row. What it is given is checked as no real device would: which sequence holds a block, that a block table is told
of every change, and that nothing is read that was not written.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import Wait

VOCABULARY = 50
EOS = 2


class Broken(Exception):
    """What a device raises that was told to break."""


def next_id(before: int, token: int) -> tuple[int, int]:
    """Returns a state of all tokens up to ``token``, given that of those before it, and the id that follows it."""
    state = hash((before, token))
    return state, 3 + state % (VOCABULARY - 3)


def piece(token: int) -> str:
    """Returns what a token stands for: one or two of three letters, so that stop strings of few come often."""
    return "abc"[token % 3] * (1 + token // 3 % 2)


def stopped(tokens: Iterable[int], strings: Iterable[str]) -> bool:
    """Whether a stop string lies in the text of tokens that does not without the last of them."""
    *before, last = map(piece, tokens)
    text = "".join(before)
    ends = [(text + last).find(string, max(0, len(text) + 1 - len(string))) for string in strings]
    return any(end >= 0 for end in ends)


def alone(
    prompt: tuple[int, ...], output_len: int, eos_at: int | None, strings: tuple[str, ...] = ()
) -> tuple[list[int], str]:
    """Returns what the device gives for a request, and how it ends; ``eos_at`` is the end of sequence's number."""
    tokens, state = [], 0
    for token in prompt:
        state, following = next_id(state, token)
    for number in range(output_len):
        if number == eos_at:
            return [*tokens, EOS], "eos"
        tokens.append(following)
        if strings and stopped([*prompt, *tokens], strings):
            return tokens, "stop"
        state, following = next_id(state, following)
    return tokens, "length"


@dataclass(slots=True)
class _Part:
    """A chunk as the device sees it: no sequence of the scheduler's, which goes on changing."""

    uid: int
    prompt_len: int
    start: int
    tokens: list[int]
    blocks: list[int]
    last: bool
    before: list[int]  # where blocks are shared: the prompt's tokens that others may have computed


class LateDevice:
    """A runner of ``depth`` 0 or 1 over such a device.

    Args:
        pass_s: seconds that a pass takes.
        eos_at: by uid, the number of the output token that is the end of sequence.
        fails: what raises :class:`Broken`, ``launch`` or ``wait``, and in which pass, from 0.
        shared: whether a block may have several holders, whose prompts are the same so far.
    """

    name = "late"
    every_token = False
    device_time = None

    def __init__(
        self,
        depth: int,
        block_size: int = 4,
        blocks: int = 64,
        slots: int = 64,
        pass_s: float = 0.0,
        eos_at: dict[int, int] | None = None,
        fails: tuple[str, int] | None = None,
        shared: bool = False,
    ) -> None:
        self.depth = depth
        self.shared = shared
        self.block_size = block_size
        self.blocks = blocks
        self.pass_s = pass_s
        self.eos_at = eos_at or {}
        self.fails = fails
        self.launched = self.waited = 0
        self.shapes: list[list[tuple[int, int, int]]] = []  # of each pass: uid, start and length of its chunks
        self.ended: list[float] = []  # when each pass ended, by time.perf_counter()
        self.table: list[list[int]] = [[] for _ in range(slots)]
        self.holders: dict[int, int] = {}  # uid by block, of the sequences that may come again
        self._rows = 0  # of the pass launched last
        self._previous: list[int] = []
        self._cells: dict[tuple[int, int], tuple[int, int, int]] = {}  # uid, position and state, by block and offset
        self._jobs: queue.SimpleQueue[tuple[list[_Part], Future[list[int]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="late device")
        self._thread.start()

    def close(self) -> None:
        """Ends the device's thread."""
        self._jobs.put(None)
        self._thread.join()

    def load(self) -> None:
        """Nothing to load."""

    def stop_ids(self) -> frozenset[int]:
        """The end of sequence, where one is to come."""
        return frozenset([EOS] if self.eos_at else [])

    def allocate(self, max_blocks: int) -> int:
        """Returns the blocks there are."""
        return min(self.blocks, max_blocks)

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """There are none."""
        raise NotImplementedError

    def free(self, sequence: Sequence) -> None:
        """Forgets who held what, unless another holds it by now."""
        self.holders = {block: uid for block, uid in self.holders.items() if uid != sequence.uid}

    def launch(self, batch: RaggedBatch) -> Wait:
        """Checks a pass and hands it to the device."""
        number = self.launched
        assert number - self.waited <= self.depth, "more passes are under way than agreed"
        self._fail("launch", number)
        parts = self._parts(batch)
        self._rows = sum(part.last for part in parts)
        self.shapes.append([(part.uid, part.start, len(part.tokens)) for part in parts])
        self.launched += 1
        future: Future[list[int]] = Future()
        self._jobs.put((parts, future))

        def wait() -> list[int]:
            assert self.waited == number, "passes are waited for in order"
            self.waited += 1
            self._fail("wait", number)
            return future.result()

        if not self.depth:
            future.exception()  # returns when the pass has ended
        return wait

    def _fail(self, what: str, number: int) -> None:
        if self.fails == (what, number):
            raise Broken(f"{what} of pass {number}")

    def _parts(self, batch: RaggedBatch) -> list[_Part]:
        for sequence in batch.grown:
            self.table[sequence.slot] = list(sequence.blocks)
        assert len({sequence.slot for sequence, *_ in batch.chunks}) == len(batch.chunks), "a slot has one sequence"
        for sequence in batch.grown:  # blocks are another's as soon as the scheduler says so
            self.holders |= dict.fromkeys(sequence.blocks, sequence.uid)
        parts = []
        for place, (sequence, start, length, last) in enumerate(batch.chunks):
            tokens = sequence.tokens[start : start + length]
            assert 0 <= sequence.slot < len(self.table)
            assert self.table[sequence.slot] == sequence.blocks, "the block table was not told of a change"
            if not self.shared:
                assert all(self.holders[block] == sequence.uid for block in sequence.blocks), "a block has one holder"
            assert len(tokens) == length and len(sequence.blocks) * self.block_size >= start + length
            assert last == (start + length == len(sequence.tokens))
            if min(tokens) < 0:
                assert self.depth and length == 1 and place < batch.decode_tokens, "only a decode waits for an id"
                assert -tokens[0] <= self._rows, "the pass before has no such row"
            blocks = list(sequence.blocks)
            before = sequence.tokens[: min(start, sequence.prompt_len)] if self.shared else []
            parts.append(_Part(sequence.uid, sequence.prompt_len, start, tokens, blocks, last, before))
        return parts

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            parts, future = job
            time.sleep(self.pass_s)
            try:
                self._previous = self._compute(parts)
                self.ended.append(time.perf_counter())
                future.set_result(list(self._previous))
            except BaseException as error:  # for who waits
                future.set_exception(error)

    def _compute(self, parts: list[_Part]) -> list[int]:
        """Writes each token's cell and reads those before it; returns the ids of the ``last`` parts."""
        ids = []
        for part in parts:
            state = self._cell(part, part.start - 1) if part.start else 0
            for place, token in enumerate(part.tokens, part.start):
                known = token if token >= 0 else self._previous[-token - 1]
                state, following = next_id(state, known)
                block = part.blocks[place // self.block_size]
                self._cells[block, place % self.block_size] = (part.uid, place, state)
            for place in range(part.start):
                self._cell(part, place)
            expected = 0
            for place, token in enumerate(part.before):
                expected, _ = next_id(expected, token)
                assert self._cell(part, place) == expected, "keys and values of another prompt"
            if part.last:
                number = part.start + len(part.tokens) - part.prompt_len
                ids.append(EOS if self.eos_at.get(part.uid) == number else following)
        return ids

    def _cell(self, part: _Part, place: int) -> int:
        uid, position, state = self._cells[part.blocks[place // self.block_size], place % self.block_size]
        assert position == place and (uid == part.uid or place < len(part.before)), (
            "keys and values of another sequence"
        )
        return state


class Late:
    """A runner of depth 1 that computes passes with another one, on a thread of its own."""

    depth = 1

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self._previous: list[int] = []
        self._device = ThreadPoolExecutor(1, "late device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Computes on the same thread, which a process group may be used by."""
        return self._device.submit(self.runner.logits, batch, rows).result()

    def launch(self, batch: RaggedBatch) -> Wait:
        """Keeps what the pass needs of its sequences, which change, and hands it to the thread."""
        chunks = []
        for sequence, start, length, last in batch.chunks:
            own = Sequence(sequence.uid, list(sequence.tokens), sequence.prompt_len, 0, start, list(sequence.blocks))
            chunks.append((own, start, length, last))
        return self._device.submit(self._compute, dataclasses.replace(batch, chunks=chunks)).result

    def _compute(self, batch: RaggedBatch) -> list[int]:
        for sequence, *_ in batch.chunks:
            if sequence.tokens[-1] < 0:
                sequence.tokens[-1] = self._previous[-sequence.tokens[-1] - 1]
        self._previous = self.runner.launch(batch)()
        return self._previous
