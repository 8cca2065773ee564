"""Who holds which blocks of the KV cache. Plain Python: numbers of blocks, never their contents."""

from __future__ import annotations

import heapq
from typing import NamedTuple


class KvPool(NamedTuple):
    """A KV cache of blocks: how many a replica has, and tokens in each."""

    blocks: int
    block_size: int


class KvBlocks:
    """A pool of ``total`` equal blocks of ``block_size`` tokens.

    The free block with the lowest number is given out first, so that the blocks in use stay a dense
    prefix of the pool: a runner may then attend over that prefix in place, and memory that was never
    needed is never touched.
    """

    __slots__ = ("_free", "block_size", "peak", "total")

    def __init__(self, total: int, block_size: int) -> None:
        """Raises ValueError unless both are positive."""
        if total < 1 or block_size < 1:
            raise ValueError(f"a pool of {total} blocks of {block_size} tokens is no pool")
        self.total = total
        self.block_size = block_size
        self.peak = 0
        self._free = list(range(total))  # ascending, hence already a heap

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - len(self._free)

    def needed(self, tokens: int) -> int:
        """Returns how many blocks hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Takes ``count`` blocks out of the pool; raises IndexError, nothing taken, if so many are not free."""
        if count > len(self._free):
            raise IndexError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self.peak = max(self.peak, self.used)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Returns ``blocks`` to the pool and empties the list, so that nobody can give them back twice."""
        for block in blocks:
            heapq.heappush(self._free, block)
        blocks.clear()


def blocks_at_end(prompt_tokens: int, output_len: int, block_size: int) -> int:
    """Returns the blocks that a request holds at its end; the last token is never fed back, so never stored."""
    return -(-(prompt_tokens + output_len - 1) // block_size)


def refusal(prompt_tokens: int, output_len: int, block_size: int, total: int) -> str | None:
    """Returns why a request could never run in a cache of ``total`` blocks, or None when it can."""
    needed = blocks_at_end(prompt_tokens, output_len, block_size)
    if needed <= total:
        return None
    return (
        f"prompt of {prompt_tokens} tokens + output_len {output_len} needs {needed} KV blocks of "
        f"{block_size} tokens, the cache has {total} (engine.kv_memory)"
    )
