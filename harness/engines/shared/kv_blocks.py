"""Who holds which blocks of the KV cache. Plain Python: numbers of blocks, never their contents."""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
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

    def keys(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """Returns the keys of a prompt's whole blocks; none here, where no block is shared."""
        return ()

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Returns the blocks of the longest beginning of ``keys`` that can be found."""
        return []

    def idle(self, blocks: Sequence[int]) -> int:
        """Returns how many of ``blocks`` are free: those that :meth:`hold` takes out of the pool."""
        return 0

    def hold(self, blocks: list[int]) -> list[int]:
        """Adds a holder to each of ``blocks``, which :meth:`find` has returned, and returns them."""
        return blocks

    def publish(self, blocks: Sequence[int], keys: Sequence[bytes], begin: int, end: int) -> None:
        """Lets the blocks of a sequence be found that are full once its tokens from ``begin`` to ``end`` are computed.

        Args:
            blocks, keys: of the sequence; ``keys`` as :meth:`keys` returned them.
        """


class SharedKvBlocks(KvBlocks):
    """A pool whose blocks several sequences may hold, where they begin with the same tokens.

    A block that is full and computed is published under the key of what it holds (:func:`prefix_keys`), and nobody
    writes it while it has that key. When its last holder has given it back it is free, but can still be found, until it
    is handed out for something else. Blocks without a key are handed out first, the lowest number first, then those
    that have been free the longest; of a sequence's own the last goes first: without those before it nobody finds it.
    """

    __slots__ = ("_blocks", "_holders", "_idle", "_keys")

    def __init__(self, total: int, block_size: int) -> None:
        super().__init__(total, block_size)
        self._holders = [0] * total
        self._keys: list[bytes | None] = [None] * total
        self._blocks: dict[bytes, int] = {}  # by key, those that can be found
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and still to be found, the longest free first

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those that can still be found among them."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold, each once."""
        return self.total - self.free

    def keys(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """See :func:`prefix_keys`."""
        return prefix_keys(tokens, self.block_size)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """See :meth:`KvBlocks.find`."""
        found: list[int] = []
        for key in keys:
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """See :meth:`KvBlocks.idle`."""
        return sum([not self._holders[block] for block in blocks])

    def hold(self, blocks: list[int]) -> list[int]:
        """See :meth:`KvBlocks.hold`."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1
        return blocks

    def take(self, count: int) -> list[int]:
        """See :meth:`KvBlocks.take`; what was to be found in these blocks is not any more."""
        if count > self.free:
            raise IndexError(f"{count} blocks asked for, {self.free} free")
        blocks = []
        for _ in range(count):
            block = heapq.heappop(self._free) if self._free else self._forget()
            self._holders[block] = 1
            blocks.append(block)
        self.peak = max(self.peak, self.used)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Takes a holder from each of ``blocks`` and empties the list; what nobody holds then is free."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                heapq.heappush(self._free, block)
            else:
                self._idle[block] = None
        blocks.clear()

    def publish(self, blocks: Sequence[int], keys: Sequence[bytes], begin: int, end: int) -> None:
        """See :meth:`KvBlocks.publish`; of several blocks with the same contents the first is found."""
        size = self.block_size
        for place in range(begin // size, min(end // size, len(keys))):
            if keys[place] not in self._blocks:
                self._blocks[keys[place]] = blocks[place]
                self._keys[blocks[place]] = keys[place]

    def _forget(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._blocks[key]
        self._keys[block] = None
        return block


def prefix_keys(tokens: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Returns a key for each whole block of a prompt: the BLAKE2b digest, 32 bytes, of all ids up to the block's end.

    Keys and values of a block depend on all tokens before them, and so does its key. The digest is cryptographic:
    nobody can find two prompts with one key, so that equal keys are equal tokens.
    """
    digest, keys = blake2b(digest_size=32), []
    for begin in range(0, len(tokens) - block_size + 1, block_size):
        digest.update(array("q", tokens[begin : begin + block_size]))
        keys.append(digest.digest())
    return tuple(keys)


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
