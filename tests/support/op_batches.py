"""Ragged batches as DeepSpeed hands them to its kernels: a rank's sizes, chunks, tables of blocks, attention atoms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """One rank's part of a model, and a batch of chunks ``(first position, tokens)``."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    spans: tuple[tuple[int, int], ...]

    @property
    def widths(self) -> list[int]:
        """Columns of queries, keys and values."""
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]

    @property
    def rows(self) -> int:
        """Tokens of the batch."""
        return sum(length for _, length in self.spans)


# Of every batch some chunks begin a sequence, some go on with one, some are decodes; some end at the edge of a block.
SHORT = ((40, 1), (0, 130), (100, 33), (127, 1), (5, 70), (0, 1))
LONG = ((3000, 1), (17, 1), (0, 200), (513, 130), (1023, 1), (3900, 60), (128, 1), (0, 1))
TINY = Sizes("tiny", 512, 256, 8, 2, 64, 320, SHORT)
LLAMA = (
    TINY,
    Sizes("7B", 4096, 11008, 32, 32, 128, 32000, LONG),
    Sizes("70B over 8 ranks", 8192, 3584, 8, 1, 128, 4000, LONG),
)


@dataclass
class Batch:
    """What DeepSpeed's ``RaggedBatchWrapper`` hands its kernels, on one device.

    Attributes:
        counts: int32 ``[2]`` tokens and sequences.
        sequences: int32 ``[n, 4]`` first row, tokens, tokens before them, unused.
        owners: int32 ``[tokens]``.
        pointers: int64 ``[n]`` addresses of the rows of ``table``.
        table: int32 ``[n, blocks]``.
    """

    counts: Tensor
    sequences: Tensor
    owners: Tensor
    pointers: Tensor
    table: Tensor = field(repr=False)

    @classmethod
    def of(cls, spans: list[tuple[int, int]], blocks: list[list[int]], other: int, device: str) -> Batch:
        """Returns the batch of chunks of sequences that hold these blocks; a table goes on with an ``other`` one."""
        starts, lengths = (torch.tensor(part, dtype=torch.int32) for part in zip(*spans, strict=True))
        table = torch.full((len(spans), max(map(len, blocks)) + 1), other, dtype=torch.int32)
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = torch.tensor(own)
        table = table.to(device)
        width = table.stride(0) * table.element_size()
        return cls(
            torch.tensor([int(lengths.sum()), len(spans)], dtype=torch.int32, device=device),
            torch.stack([lengths.cumsum(0) - lengths, lengths, starts, 0 * starts], 1).int().to(device),
            torch.repeat_interleave(torch.arange(len(spans)), lengths).int().to(device),
            (table.data_ptr() + width * torch.arange(len(spans))).to(device),
            table,
        )

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What most kernels take, in their order."""
        return self.counts, self.sequences, self.owners, self.pointers


def block_sizes(head_dim: int, device: str) -> tuple[int, int]:
    """Returns the most tokens of an attention atom, and the tokens of a block of the cache, as DeepSpeed has them."""
    if device == "cpu":
        return 128, 128 if head_dim <= 64 else 64  # of compute capability 8.0 and 9.0
    from deepspeed.inference.v2.kernels.ragged_ops import get_kv_block_size, get_q_block_size

    return get_q_block_size(head_dim), get_kv_block_size(head_dim)


def built_atoms(kernels: Any, batch: Batch, query_block: int, kv_block: int) -> Tensor:
    """Returns the batch's attention atoms, int32 ``[atoms, 8]`` on the host, built as DeepSpeed's attention does."""
    room = int(batch.counts[0]) + 1
    host = kernels.allocate_fast_host_buffer(torch.zeros(room, 8, dtype=torch.int32, device=batch.table.device))
    assert host.device.type == "cpu" and host.shape == (room, 8) and host.dtype is torch.int32
    host.fill_(-7)
    places = (batch.counts.cpu(), batch.sequences.cpu(), batch.pointers.cpu())
    count = kernels.build_atoms(host, *places, query_block, kv_block)
    assert bool((host[count:] == -7).all()), "more atoms are written than are counted"
    return host[:count]
