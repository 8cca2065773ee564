"""Dynamic SplitFuse: which tokens go into the next pass.

Every pass has room for ``token_budget`` tokens. All running decodes go in first, one token each; prompts
fill the rest, a long one split over several passes, short ones composed. The forward pass costs by the
number of its tokens, not of its sequences, and its throughput is concave in that number, so full and
equal passes are the fastest way through a list of requests (Holmes et al., "DeepSpeed-FastGen", 2024).

Plain Python: no torch, no device, no clock. A pass costs O(running sequences), whatever waits behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from harness.costs.work import PassWork
from harness.engines.shared.kv_blocks import KvBlocks, refusal


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine.

    Attributes:
        tokens: the prompt's ids, then the generated ones.
        computed: how many of ``tokens``, from the front, have their keys and values in the cache.
        blocks: numbers of the cache blocks held, in the order of the tokens they hold.
        finish_reason: None while unfinished, then ``eos`` or ``length``.
    """

    uid: int
    tokens: list[int]
    prompt_len: int
    max_new_tokens: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def output_ids(self) -> list[int]:
        """The generated ids, EOS included."""
        return self.tokens[self.prompt_len :]


class Chunk(NamedTuple):
    """``length`` tokens of one sequence, from position ``start``; ``last`` when its newest token is among them."""

    sequence: Sequence
    start: int
    length: int
    last: bool


@dataclass(slots=True)
class RaggedBatch:
    """One pass: chunks in order, decodes first. Its logits rows are those of the ``last`` chunks, in order."""

    chunks: list[Chunk]
    decode_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """All tokens of the pass."""
        return self.decode_tokens + self.prompt_tokens

    @property
    def work(self) -> PassWork:
        """What the pass costs by."""
        rows = decodes = self.decode_tokens
        keys = pairs = decodes + sum([chunk[1] for chunk in self.chunks[:decodes]])
        for _, start, length, last in self.chunks[decodes:]:
            rows += last
            keys += start + length
            pairs += length * (2 * start + length + 1) // 2  # token i of the chunk sees start + i + 1 keys
        return PassWork(self.tokens, self.prompt_tokens, self.decode_tokens, len(self.chunks), rows, keys, pairs)


class Scheduler:
    """Owns admission, chunking, preemption and finishing.

    It cannot deadlock: a sequence is accepted only if the whole pool can hold it to its end; it is
    admitted only with blocks for all its present tokens; and when a decode finds no free block, the
    youngest running sequence gives its own back, so the oldest always moves on.

    Args:
        token_budget: most tokens in one pass.
        max_sequences: most sequences running at a time, at most ``token_budget``.
        blocks: the KV cache's blocks.
        stop_ids: token ids that end a sequence.
    """

    def __init__(
        self, token_budget: int, max_sequences: int, blocks: KvBlocks, stop_ids: frozenset[int] = frozenset()
    ) -> None:
        if not 1 <= max_sequences <= token_budget:
            raise ValueError(f"max_sequences {max_sequences} must be from 1 to the token budget {token_budget}")
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.blocks = blocks
        self.stop_ids = stop_ids
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first
        self.preempted: list[Sequence] = []  # by the latest schedule(), their cache contents void
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.peak_sequences = 0

    def refusal(self, prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Returns why a request could never run in this cache, or None when it can."""
        return refusal(prompt_tokens, max_new_tokens, self.blocks.block_size, self.blocks.total)

    def submit(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue; raises ValueError for one that :meth:`refusal` refuses."""
        reason = self.refusal(sequence.prompt_len, sequence.max_new_tokens)
        if reason or not sequence.tokens or sequence.max_new_tokens < 1:
            raise ValueError(reason or "a sequence needs a prompt and room for one token")
        self.waiting.append(sequence)

    @property
    def unfinished(self) -> int:
        """Sequences submitted and not finished."""
        return len(self.running) + len(self.waiting)

    def schedule(self) -> RaggedBatch:
        """Returns the next pass; empty only when nothing is left to do."""
        self.preempted = []
        chunks, prompts = self._decodes()
        decode_tokens = len(chunks)
        room = self.token_budget - decode_tokens
        for sequence in prompts:
            if room == 0:
                break
            room -= self._chunk(sequence, room, chunks)
        if not self.preempted:  # or the cache would be filled again at once by what was just thrown out
            room = self._admit(room, chunks)
        self.peak_sequences = max(self.peak_sequences, len(self.running))
        return RaggedBatch(chunks, decode_tokens, self.token_budget - decode_tokens - room)

    def complete(self, batch: RaggedBatch, token_ids: SequenceOf[int]) -> list[Sequence]:
        """Books a computed pass and returns the sequences it finished, their blocks given back.

        Args:
            batch: what :meth:`schedule` returned.
            token_ids: the next token of each ``last`` chunk, in order.
        """
        finished = []
        row = 0
        stop_ids = self.stop_ids
        for sequence, start, length, last in batch.chunks:
            sequence.computed = start + length
            if not last:
                continue
            token = token_ids[row]
            row += 1
            tokens = sequence.tokens
            tokens.append(token)
            if token in stop_ids:
                sequence.finish_reason = "eos"
            elif len(tokens) - sequence.prompt_len >= sequence.max_new_tokens:
                sequence.finish_reason = "length"
            else:
                continue
            finished.append(sequence)
        if row != len(token_ids):
            raise ValueError(f"{len(token_ids)} tokens for {row} sequences")
        if finished:
            for sequence in finished:
                self.blocks.give_back(sequence.blocks)
            self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
        return finished

    def _decodes(self) -> tuple[list[Chunk], list[Sequence]]:
        """Returns one chunk for each running decode, and the sequences still on their prompt (or recomputing it)."""
        chunks: list[Chunk] = []
        prompts: list[Sequence] = []
        running = self.running
        block_size = self.blocks.block_size
        for sequence in running:  # what is preempted is taken from its end, hence not met any more
            computed = sequence.computed
            if len(sequence.tokens) - computed > 1 or computed < sequence.prompt_len:
                prompts.append(sequence)
            else:
                if not computed % block_size and computed == len(sequence.blocks) * block_size:
                    while not self.blocks.free and running[-1] is not sequence:
                        self._preempt(running.pop())
                    if not self.blocks.free:
                        self._preempt(running.pop())
                        break
                    sequence.blocks += self.blocks.take(1)
                chunks.append(Chunk(sequence, computed, 1, True))
        return chunks, prompts

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the head of the queue, keeping its tokens but not its cache."""
        self.blocks.give_back(sequence.blocks)
        self.preemptions += 1
        self.recomputed_tokens += sequence.computed
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preempted.append(sequence)

    def _chunk(self, sequence: Sequence, room: int, chunks: list[Chunk]) -> int:
        """Appends as much of a prompt as there is room for, and returns how many tokens that is."""
        start = sequence.computed
        left = len(sequence.tokens) - start
        length = min(left, room)
        chunks.append(Chunk(sequence, start, length, length == left))
        return length

    def _admit(self, room: int, chunks: list[Chunk]) -> int:
        """Admits waiting sequences while tokens, sequences and blocks allow; returns the room left."""
        while room and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            needed = self.blocks.needed(len(sequence.tokens))
            # One block of headroom for each that runs already: each may ask for one within block_size passes.
            if needed + len(self.running) > self.blocks.free and self.running:
                break
            self.waiting.popleft()
            sequence.blocks += self.blocks.take(needed)
            self.running.append(sequence)
            room -= self._chunk(sequence, room, chunks)
        return room
