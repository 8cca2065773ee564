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
        every_token: whether there are logits of other tokens than the last of a chunk.
        block_size: tokens in a block of the KV cache, known after ``load``: the kernels may have a say in it.
    """

    name: str
    every_token: bool

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

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Does what ``forward`` does, by the same kernels, and returns logits, ``[rows, vocab]``, on any device.

        Args:
            rows: of which of the batch's tokens, where ``every_token`` is true; None is those of ``forward``.
        """

    def free(self, sequence: Sequence) -> None:
        """Forgets a finished or preempted sequence's cache contents."""
