"""What the engine asks of a forward pass, whoever computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from harness.engines.fastgen.scheduler import RaggedBatch, Sequence

if TYPE_CHECKING:
    from torch import Tensor


class Runner(Protocol):
    """Computes passes; never decides an order.

    ``load`` comes first, then ``allocate``, then any number of ``forward`` and ``free``.

    Attributes:
        name: what computes the passes, for the record.
        block_size: tokens in a block of the KV cache, known after ``load``: the kernels may have a say in it.
    """

    name: str

    @property
    def block_size(self) -> int: ...

    def load(self) -> None:
        """Loads the weights onto the device."""

    def stop_ids(self) -> frozenset[int]:
        """Returns the token ids that end a sequence, none under ``generation.stop=length``."""

    def allocate(self, max_blocks: int) -> int:
        """Makes the KV cache, at most ``max_blocks`` blocks, and returns how many there are."""

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Computes all tokens of ``batch`` and stores their keys and values.

        Returns:
            One row for each ``last`` chunk, in order: the greedy token's id, int64 ``[rows]``, or logits
            ``[rows, vocab]``.
        """

    def logits(self, batch: RaggedBatch) -> Tensor:
        """Does what ``forward`` does, by the same kernels, and returns logits, ``[rows, vocab]``, on any device."""

    def free(self, sequence: Sequence) -> None:
        """Forgets a finished or preempted sequence's cache contents."""
