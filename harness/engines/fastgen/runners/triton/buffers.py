"""Where a pass computes: made once, for the largest pass, so that no pass takes memory and graphs find all in place."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels.attention import Parts, splits_for
from harness.engines.fastgen.runners.triton.plan import Limits
from harness.engines.fastgen.runners.triton.shard import Shard


class Buffers:
    """Activations of a rank.

    Args:
        context: tokens of the longest sequence.
        processors: of the device.

    Inside a layer attention and MLP take turns: their intermediate results are in the same memory.

    Attributes:
        residual, normed, added: ``[tokens, hidden]``; ``added`` is what a block gives, to be added to ``residual``.
        last: two of ``[sequences, hidden]``: residual and result of the rows whose logits are wanted.
        logits: ``[sequences, rows of the vocabulary]``.
        ids, values: int32 and float32 ``[sequences]``: the chosen ids, for the next pass to read, and their logits.
        mine: int32 ``[2, sequences]``, under tensor parallelism: ids and logits (as bits) of this rank's best.
        all_best: int32 ``[tp, 2, sequences]``: those of all ranks.
        best: int32 ``[2, tp, sequences]``: the same.
    """

    def __init__(
        self,
        shard: Shard,
        limits: Limits,
        context: int,
        processors: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shard, self.limits, self.context, self.processors = shard, limits, context, processors
        tokens, rows = limits.tokens, limits.sequences

        def room(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.residual, self.normed, self.added = (room(tokens, shard.hidden) for _ in range(3))
        self._inside = room(tokens * max(shard.qkv_width + shard.query_width, 3 * shard.inner))
        self.last = [room(rows, shard.hidden) for _ in range(2)]
        self.logits = room(rows * shard.rows)
        self.ids = room(rows, dtype=torch.int32)
        self.values = room(rows, dtype=torch.float32)
        if shard.tp > 1:
            self.mine = room(2, rows, dtype=torch.int32)
            self.all_best = room(shard.tp, 2, rows, dtype=torch.int32)
            self.best = room(2, shard.tp, rows, dtype=torch.int32)
        self.parts = Parts.of(limits.group, shard.head_dim, processors, device)

    def splits(self, singles: int) -> int:
        """Returns into how many parts the keys of so many one-token tiles are cut.

        Long contexts are assumed, so that a pass gives the same bits inside a graph and outside.
        """
        return splits_for(singles, self.shard.kv_heads, self.context, self.processors)

    def attention(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns query, key and value, ``[tokens, qkv_width]``, and what is attended to, ``[tokens, query_width]``."""
        shard = self.shard
        return self._split(tokens, shard.qkv_width, shard.query_width)

    def mlp(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns gate and up, ``[tokens, 2 * inner]``, and their product, ``[tokens, inner]``."""
        return self._split(tokens, 2 * self.shard.inner, self.shard.inner)

    def _split(self, tokens: int, first: int, second: int) -> tuple[Tensor, Tensor]:
        middle = self.limits.tokens * first
        one, other = self._inside[: tokens * first], self._inside[middle : middle + tokens * second]
        return one.view(tokens, first), other.view(tokens, second)
