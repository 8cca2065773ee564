"""One model over several ranks: the leader's passes, computed by all of them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from harness.engines.fastgen.batch import Chunk, RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import Runner, Wait
from harness.ranks.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from torch import Tensor


class _Told(NamedTuple):
    """What the leader tells the others of a pass; they keep what they were told before.

    Attributes:
        freed: uids of sequences to forget first.
        grown: uid, slot and blocks of each sequence whose blocks have changed.
        chunks: uid, start, last and token ids; none where there are no more passes.
        logits: whether the leader calls :meth:`Runner.logits`, and they with it.
        warming: whether it is in :meth:`Runner.warming`.
    """

    freed: list[int]
    grown: list[tuple[int, int, list[int]]]
    chunks: list[tuple[int, int, bool, list[int]]]
    decode_tokens: int = 0
    draft_tokens: int = 0
    logits: bool = False
    warming: bool = False


class ShardedRunner:
    """Stands before each rank's own runner: on the leader it also tells the others what to compute.

    Token ids and KV blocks come from the leader alone, so ranks cannot drift apart, whatever their rounding.
    """

    def __init__(self, runner: Runner, tensor: TensorParallel) -> None:
        self.runner = runner
        self.tensor = tensor
        self.name = runner.name
        self.depth = runner.depth
        self.device_time = runner.device_time
        self.every_token = False
        self._warming = False
        self._freed: list[int] = []
        self._followed: dict[int, Sequence] = {}

    @property
    def block_size(self) -> int:
        """See :class:`Runner`."""
        return self.runner.block_size

    def load(self) -> None:
        """Loads this rank's shard."""
        self.runner.load()

    def stop_ids(self) -> frozenset[int]:
        """See :meth:`Runner.stop_ids`."""
        return self.runner.stop_ids()

    def allocate(self, max_blocks: int) -> int:
        """Makes this rank's cache; returns the blocks of the rank that has the fewest."""
        return self.tensor.least(self.runner.allocate(max_blocks))

    @contextmanager
    def warming(self) -> Iterator[None]:
        """See :meth:`Runner.warming`; for the followers too. The leader's."""
        self._warming = True
        try:
            with self.runner.warming():
                yield
        finally:
            self._warming = False

    def launch(self, batch: RaggedBatch) -> Wait:
        """Starts ``batch`` with the followers; the leader's."""
        self._tell(batch, logits=False)
        return self.runner.launch(batch)

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Computes ``batch`` with the followers, the logits of its last tokens alone; the leader's."""
        assert rows is None
        self._tell(batch, logits=True)
        return self.runner.logits(batch)

    def _tell(self, batch: RaggedBatch, logits: bool) -> None:
        grown = [(sequence.uid, sequence.slot, sequence.blocks) for sequence in batch.grown]
        chunks = [
            (sequence.uid, start, last, sequence.tokens[start : start + length])
            for sequence, start, length, last in batch.chunks
        ]
        counts = batch.decode_tokens, batch.draft_tokens
        self.tensor.share(_Told(self._freed, grown, chunks, *counts, logits, self._warming))
        self._freed = []

    def free(self, sequence: Sequence) -> None:
        """Forgets a sequence here, and with the next pass elsewhere; the leader's."""
        self._freed.append(sequence.uid)
        self.runner.free(sequence)

    def release(self) -> None:
        """Ends the followers' :meth:`follow`; the leader's."""
        self.tensor.share(_Told(self._freed, [], []))
        self._freed = []

    def follow(self) -> None:
        """Computes the leader's passes until it calls :meth:`release`."""
        launched: deque[Wait] = deque()
        while True:
            told: _Told = self.tensor.share()
            for uid in told.freed:
                if (sequence := self._followed.pop(uid, None)) is not None:
                    self.runner.free(sequence)
            if told.chunks:
                batch = self._batch(told)
                with self.runner.warming() if told.warming else nullcontext():
                    if told.logits:
                        self.runner.logits(batch)
                    else:
                        launched.append(self.runner.launch(batch))
            while len(launched) > (self.depth if told.chunks else 0):
                launched.popleft()()
            if not told.chunks:
                return

    def _batch(self, told: _Told) -> RaggedBatch:
        """Returns the leader's batch, over this rank's own copies of the sequences."""
        followed = self._followed
        grown = []
        for uid, slot, blocks in told.grown:
            sequence = followed.setdefault(uid, Sequence(uid, [], 0, 0))
            sequence.slot, sequence.blocks = slot, blocks
            grown.append(sequence)
        chunks: list[Chunk] = []
        for uid, start, last, tokens in told.chunks:
            sequence = followed[uid]
            sequence.tokens += [0] * (start - len(sequence.tokens))  # what lies in blocks that it shares is never read
            sequence.tokens[start:] = tokens  # a preempted sequence starts anew
            chunks.append((sequence, start, len(tokens), last))
        decodes, drafts = told.decode_tokens, told.draft_tokens
        prompt_tokens = sum(length for _, _, length, _ in chunks) - decodes - drafts
        return RaggedBatch(chunks, decodes, prompt_tokens, grown, drafts)
