"""What the device has to know of a pass: which tokens, where their keys and values go, whose blocks they read.

All of it is int32 numbers in one buffer of fixed sections, built by numpy and sent in a single copy. Of buffers on the
host there are two, so that a pass can be planned while the copy of the one before is still under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.engines.fastgen.batch import RaggedBatch
from harness.engines.fastgen.runners.triton.kernels.attention import Chunks, Tiles, tile_rows

Numbers = NDArray[np.int32]
ALIGNED = 16  # numbers: sections start where Triton takes a pointer for aligned, whatever a pass's sizes


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a pass can be.

    Attributes:
        tokens, sequences: ``engine.token_budget`` and ``engine.max_sequences``.
        blocks: of the KV cache, the scratch block not counted.
        block_size: tokens of a block, a power of two.
        width: blocks of the longest sequence.
        group: query heads that share a key-value head.
        vocab: token ids are below it.
        sharing: whether several sequences may hold a block.
    """

    tokens: int
    sequences: int
    blocks: int
    block_size: int
    width: int
    group: int
    vocab: int
    sharing: bool = False

    @property
    def listed(self) -> int:
        """The most blocks that the sequences of a pass hold, a shared one counted for each."""
        return self.sequences * self.width if self.sharing else self.blocks

    @property
    def tile_tokens(self) -> int:
        """Tokens of a prompt that one tile computes."""
        return self.tile_rows // self.group

    @property
    def tile_rows(self) -> int:
        """Query rows of a prompt's tile."""
        return tile_rows(self.group, decode=False)

    @property
    def single_rows(self) -> int:
        """Query rows of a tile of one token."""
        return tile_rows(self.group, decode=True)

    @property
    def sections(self) -> dict[str, int]:
        """The numbers of each section of the buffer."""
        tiles = self.sequences + self.tokens // self.tile_tokens
        each = dict.fromkeys(("sources", "positions", "slots", "outputs"), self.tokens)
        each |= dict.fromkeys(("begin", "start", "length", "row", "singles", "zeros"), self.sequences)
        return each | {"tile_chunk": tiles, "tile_first": tiles, "blocks": self.listed + 1}


@dataclass(frozen=True, slots=True)
class Plan:
    """A pass, as far as the host has to know it.

    Attributes:
        tokens, chunks: how many; of a padded pass, with the padding.
        singles, tiles: chunks of one token, and tiles of the longer ones.
        outputs: tokens whose logits are wanted.
        decodes: whether all chunks are of one token, and the logits of all are wanted.
    """

    tokens: int
    chunks: int
    singles: int
    tiles: int
    outputs: int

    @property
    def decodes(self) -> bool:
        """Whether every token is a chunk of its own whose logits are wanted, so that tokens, chunks, rows are one."""
        return self.tokens == self.singles == self.outputs


class Planner:
    """Plans passes into the device's buffer.

    Args:
        limits: of the passes.
        device: where the buffer is.
    """

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.limits = limits
        sizes = limits.sections
        begins = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes.values())]).tolist()
        places = {name: slice(begin, begin + sizes[name]) for name, begin in zip(sizes, begins, strict=False)}
        self.buffer = torch.zeros(begins[-1], dtype=torch.int32, device=device)
        self.device = {name: self.buffer[place] for name, place in places.items()}
        cuda = device.type == "cuda"
        self._hosts = [torch.zeros(begins[-1], dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._views = [{name: host.numpy()[place] for name, place in places.items()} for host in self._hosts]
        self._sent: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]
        # The last section is long, and sent as far as a pass fills it: so many numbers of each buffer.
        self._blocks_begin = places["blocks"].start
        self._filled = [self._blocks_begin] * 2
        self._turn = 0
        self._table = np.zeros((limits.sequences, limits.width), np.int32)  # the blocks of each slot's sequence
        self._rows = 0  # outputs of the pass before, which placeholders name
        self.device["blocks"][-1] = limits.blocks  # the scratch block, which no pass replaces

    def plan(self, batch: RaggedBatch, outputs: list[int] | None = None) -> Plan:
        """Writes a pass to the host's buffer; :meth:`send` follows.

        Args:
            outputs: tokens of the pass whose logits are wanted; None for the last of each ``last`` chunk.

        Raises:
            ValueError: the pass is larger than the limits.
            IndexError: a token id is outside the vocabulary.
        """
        limits = self.limits
        chunks, tokens = len(batch.chunks), batch.tokens
        if tokens > limits.tokens or chunks > limits.sequences:
            found = f"a pass of {tokens} tokens and {chunks} sequences"
            raise ValueError(f"{found} is above the limits of {limits.tokens} and {limits.sequences}")
        self._turn ^= 1
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()  # long since: two passes ago
        views = self._views[self._turn]
        for sequence in batch.grown:
            self._table[sequence.slot, : len(sequence.blocks)] = sequence.blocks
        sequences, starts, lengths, lasts = zip(*batch.chunks, strict=True)
        start, length = views["start"][:chunks], views["length"][:chunks]
        start[:], length[:] = starts, lengths
        ends = np.cumsum(length, dtype=np.int32)
        views["begin"][:chunks] = ends - length
        views["sources"][:tokens] = self._checked(batch.token_ids)
        own = np.fromiter([sequence.slot for sequence in sequences], np.int64, chunks)
        self._place_tokens(views, own, start, length, ends, tokens)
        singles, tiles = self._cut_into_tiles(views, length)
        rows = np.asarray(ends[np.asarray(lasts)] - 1 if outputs is None else outputs, np.int32)
        views["outputs"][: len(rows)] = rows
        self._rows = len(rows)
        return Plan(tokens, chunks, singles, tiles, len(rows))

    def pad(self, plan: Plan, rows: int) -> Plan:
        """Returns a pass of decodes as one of ``rows``; those that are no one's use the scratch block."""
        views, limits, count = self._views[self._turn], self.limits, plan.tokens
        new = slice(count, rows)
        numbers = np.arange(count, rows, dtype=np.int32)
        for name in ("begin", "singles"):
            views[name][new] = numbers
        for name in ("sources", "positions", "start"):
            views[name][new] = 0
        views["length"][new] = 1
        views["slots"][new] = limits.blocks * limits.block_size
        views["row"][new] = limits.listed
        return Plan(rows, rows, rows, 0, rows)

    def send(self) -> None:
        """Copies what was planned to the device, where earlier passes are done with what it replaces by then."""
        filled = self._filled[self._turn]
        self.buffer[:filled].copy_(self._hosts[self._turn][:filled], non_blocking=True)
        if self._sent[self._turn] is not None:
            self._sent[self._turn].record()

    def chunks(self, plan: Plan) -> Chunks:
        """Returns the chunks on the device; their rows of the table are of any length, one after another."""
        begin, start, length, row = (self.device[name][: plan.chunks] for name in ("begin", "start", "length", "row"))
        return Chunks(begin, start, length, row, self.device["blocks"].view(-1, 1))

    def singles(self, plan: Plan, splits: int) -> Tiles:
        """Returns the tiles of one token, their keys in so many parts."""
        count = plan.singles
        return Tiles(self.device["singles"][:count], self.device["zeros"][:count], self.limits.single_rows, splits)

    def tiles(self, plan: Plan) -> Tiles:
        """Returns the tiles of longer chunks."""
        chunk, first = (self.device[name][: plan.tiles] for name in ("tile_chunk", "tile_first"))
        return Tiles(chunk, first, self.limits.tile_rows)

    def _checked(self, ids: list[int]) -> Any:
        """Returns the ids as an array; raises IndexError for one that is neither a token nor a placeholder."""
        vocab, rows = self.limits.vocab, self._rows
        array = np.array(ids)
        if not -rows <= array.min() <= array.max() < vocab:
            strange = next(token for token in ids if not -rows <= token < vocab)
            raise IndexError(f"token id {strange} is outside the model's vocabulary of {vocab}")
        return array

    def _place_tokens(
        self, views: dict[str, Numbers], own: Any, start: Numbers, length: Numbers, ends: Numbers, tokens: int
    ) -> None:
        """Writes where each token is: in its sequence, and in the cache; and which blocks each chunk's keys are in."""
        size, width = self.limits.block_size, self.limits.width
        shift, table = size.bit_length() - 1, self._table.reshape(-1)
        positions = np.arange(tokens, dtype=np.int32) + np.repeat(start + length - ends, length)
        views["positions"][:tokens] = positions
        blocks = table[np.repeat(own * width, length) + (positions >> shift)]
        views["slots"][:tokens] = (blocks << shift) + (positions & (size - 1))
        held = (start + length + size - 1) >> shift
        held_ends = np.cumsum(held)
        views["row"][: len(own)] = held_ends - held
        total = int(held_ends[-1])
        self._filled[self._turn] = self._blocks_begin + total
        views["blocks"][:total] = table[np.repeat(own * width - held_ends + held, held) + np.arange(total)]

    def _cut_into_tiles(self, views: dict[str, Numbers], length: Numbers) -> tuple[int, int]:
        """Writes the tiles; returns how many are of one token, and how many of longer chunks."""
        each = self.limits.tile_tokens
        singles = np.flatnonzero(length == 1)
        views["singles"][: len(singles)] = singles
        longer = np.flatnonzero(length > 1)
        counts = -(-length[longer] // each)
        total = int(counts.sum())
        views["tile_chunk"][:total] = np.repeat(longer, counts)
        first = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        views["tile_first"][:total] = first * each
        return len(singles), total
