"""One model over several ranks: the leader's passes, computed by all of them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.engines.fastgen.runners.base import Runner
from harness.engines.fastgen.scheduler import Chunk, RaggedBatch, Sequence
from harness.ranks.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from torch import Tensor


class ShardedRunner:
    """Stands before each rank's own runner: on the leader it also tells the others what to compute.

    Token ids and KV blocks come from the leader alone, so ranks cannot drift apart, whatever their rounding.
    """

    def __init__(self, runner: Runner, tensor: TensorParallel) -> None:
        self.runner = runner
        self.tensor = tensor
        self.name = runner.name
        self.every_token = False
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

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Computes ``batch`` with the followers; the leader's."""
        self._tell(batch)
        return self.runner.forward(batch)

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Computes ``batch`` with the followers, to whom all passes are alike; the leader's."""
        assert rows is None  # the followers reduce the logits of the last tokens
        self._tell(batch)
        return self.runner.logits(batch)

    def _tell(self, batch: RaggedBatch) -> None:
        chunks = [
            (sequence.uid, start, last, sequence.tokens[start : start + length], sequence.blocks)
            for sequence, start, length, last in batch.chunks
        ]
        self.tensor.share((self._freed, chunks))
        self._freed = []

    def free(self, sequence: Sequence) -> None:
        """Forgets a sequence here, and with the next pass elsewhere; the leader's."""
        self._freed.append(sequence.uid)
        self.runner.free(sequence)

    def release(self) -> None:
        """Ends the followers' :meth:`follow`; the leader's."""
        self.tensor.share((self._freed, []))
        self._freed = []

    def follow(self) -> None:
        """Computes the leader's passes until it calls :meth:`release`."""
        while True:
            freed, chunks = self.tensor.share()
            for uid in freed:
                self.runner.free(self._followed.pop(uid))
            if not chunks:
                return
            self.runner.forward(self._batch(chunks))

    def _batch(self, chunks: list[tuple[int, int, bool, list[int], list[int]]]) -> RaggedBatch:
        """Returns the leader's batch, over this rank's own copies of the sequences."""
        own: list[Chunk] = []
        decodes = 0
        for uid, start, last, tokens, blocks in chunks:
            sequence = self._followed.setdefault(uid, Sequence(uid, [], 0, 0))
            sequence.tokens[start:] = tokens  # a preempted sequence starts anew
            sequence.blocks = blocks
            own.append(Chunk(sequence, start, len(tokens), last))
            decodes += len(tokens) == 1
        return RaggedBatch(own, decodes, sum(chunk.length for chunk in own) - decodes)
