"""What the engine asks of a forward pass, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from harness.engines.fastgen.batch import RaggedBatch, Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from harness.engines.shared.device_time import DeviceTime


Wait = Callable[[], list[int]]


class Runner(Protocol):
    """Computes passes; never decides an order.

    ``load`` comes first, then ``allocate``, then any number of ``launch``, ``logits`` and ``free``.

    Attributes:
        name: what computes the passes, for the record.
        depth: how many further passes may be launched before a pass's ids have been waited for: 0 where a pass is
            computed at once, 1 where ids stay on the device and feed the next pass there.
        device_time: what measures its passes by a device's own clock; None where nothing does.
        every_token: whether there are logits of other tokens than the last of a chunk.
        block_size: tokens in a block of the KV cache, known after ``load``: the kernels may have a say in it.
    """

    name: str
    depth: int
    every_token: bool

    @property
    def device_time(self) -> DeviceTime | None: ...

    @property
    def block_size(self) -> int: ...

    def load(self) -> None:
        """Loads the weights onto the device."""

    def stop_ids(self) -> frozenset[int]:
        """Returns the token ids that end a sequence, none under ``generation.stop=length``."""

    def allocate(self, max_blocks: int) -> int:
        """Makes the KV cache, at most ``max_blocks`` blocks, and returns how many there are."""

    def warming(self) -> AbstractContextManager[None]:
        """In it, passes need give no right ids: only run the code and touch the memory that later passes will."""

    def launch(self, batch: RaggedBatch) -> Wait:
        """Starts a pass that computes all tokens of ``batch`` and stores their keys and values.

        Nothing of ``batch`` may be read later: its sequences change as soon as this returns. A decode's token may be
        ``-(row + 1)``: the id that the pass before gives in that row, where ``depth`` is 1.

        Returns:
            What waits for the pass and returns the greedy token's id after each of ``batch.sampled``, in order. Passes
            are waited for in the order in which they were launched. Drafts are for runners of depth 0 that have
            ``every_token``.
        """

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Does what ``launch`` does, by the same kernels, and returns logits, ``[rows, vocab]``, on any device.

        Args:
            rows: of which of the batch's tokens, where ``every_token`` is true; None is ``batch.sampled``.
        """

    def free(self, sequence: Sequence) -> None:
        """Forgets a finished or preempted sequence's cache contents, perhaps for the second time.

        Its blocks and its slot may be another's already, by a pass that was launched meanwhile.
        """


class AtOnce:
    """The ``launch`` of a runner that has computed a pass when ``forward`` returns."""

    depth = 0

    def warming(self) -> AbstractContextManager[None]:
        """See :meth:`Runner.warming`."""
        return nullcontext()

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Computes a pass; returns the greedy token ids of ``batch.sampled``, int64 ``[rows]``."""
        raise NotImplementedError

    def launch(self, batch: RaggedBatch) -> Wait:
        """See :meth:`Runner.launch`."""
        return self.forward(batch).tolist
