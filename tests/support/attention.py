"""Ragged batches over a paged cache, and what their tokens attend to, in float64 and one sequence at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.paged_attention import KvCache, build_plan, ragged_attention
from harness.engines.fastgen.runners.triton.kernels.attention import Chunks, Parts, Tiles, attend, tile_rows
from support.rounding import SINGLE, near, unit

LOUD = 100.0  # what others left where a kernel may look but must not listen


@dataclass
class Shape:
    """The heads and the cache of a case."""

    head_dim: int
    group: int
    kv_heads: int
    block_size: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


class Ragged:
    """Chunks ``(start, length)`` of as many sequences, in one pass.

    All of the cache that no sequence has written is NaN, whole blocks (``other`` is one) and the rest of a last one
    alike, and a table row goes on with that block, which is not the sequence's.
    """

    def __init__(self, shape: Shape, spans: list[tuple[int, int]], seed: int) -> None:
        self.shape, self.spans = shape, spans
        device, size = shape.device, shape.block_size
        rng, randn = random.Random(seed), torch.Generator(device).manual_seed(seed)

        def normal(*wanted: int) -> Tensor:
            return torch.randn(*wanted, generator=randn, device=device)

        needed = [-(-(start + length) // size) for start, length in spans]
        order = rng.sample(range(sum(needed) + 3), sum(needed) + 3)
        width, self.other = max(needed) + 1, order[0]
        rows = rng.sample(range(len(spans) + 2), len(spans))
        table = torch.full((len(spans) + 2, width), self.other)
        poison = {"fill_value": float("nan"), "dtype": shape.dtype, "device": device}
        cache = torch.full((2, len(order), shape.kv_heads, size, shape.head_dim), **poison)
        tokens = sum(length for _, length in spans)
        columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = (2 * normal(tokens, columns)).to(shape.dtype)
        self.new = torch.full((2, shape.kv_heads, tokens, shape.head_dim), **poison)  # what the pass itself stores
        both_sizes = (2, tokens, shape.heads, shape.head_dim)
        self.expected, self.spread = torch.empty(both_sizes, dtype=torch.float64, device=device)
        self.blocks: list[list[int]] = []  # of each sequence
        self.sharpest, begin = 0.0, 0
        for (start, length), count, row in zip(spans, needed, rows, strict=True):
            own = [order.pop() for _ in range(count)]
            self.blocks.append(own)
            table[row, :count] = held = torch.tensor(own)
            both = normal(2, shape.kv_heads, start + length, shape.head_dim).to(shape.dtype)
            place = torch.arange(start + length)
            cache[:, held[place // size].to(device), :, (place % size).to(device)] = both.permute(2, 0, 1, 3)
            self.new[:, :, begin : begin + length] = both[:, :, start:]
            self._attend(begin, start, length, both.double())
            begin += length
        self.scale = shape.head_dim**-0.5
        begins = [sum(length for _, length in spans[:index]) for index in range(len(spans))]
        whole = {"dtype": torch.int32, "device": device}
        starts, lengths = zip(*spans, strict=True)
        self.chunks = Chunks(
            *(torch.tensor(one, **whole) for one in (begins, starts, lengths, rows)), table.to(**whole)
        )
        self.keys, self.values = cache

    def _attend(self, begin: int, start: int, length: int, both: Tensor) -> None:
        shape = self.shape
        own = self.qkv[begin : begin + length].double()
        query = own.view(length, -1, shape.head_dim)[:, : shape.heads].transpose(0, 1)
        keys, values = both.repeat_interleave(shape.group, 1)
        score = query @ keys.transpose(1, 2) * shape.head_dim**-0.5
        places = torch.arange(start + length, device=shape.device)
        seen = places[None, :] <= places[start:, None]
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
        self.expected[begin : begin + length] = (weight @ values).transpose(0, 1)
        self.spread[begin : begin + length] = (weight @ values.abs()).transpose(0, 1)
        self.sharpest = max(
            self.sharpest, float((query.abs() @ keys.abs().transpose(1, 2)).max()) * shape.head_dim**-0.5
        )

    def tiles(self, splits: int) -> list[Tiles]:
        """Returns the decodes' tiles and the other chunks'."""
        whole = {"dtype": torch.int32, "device": self.shape.device}
        found = []
        for decode in (True, False):
            rows = tile_rows(self.shape.group, decode)
            step = rows // self.shape.group
            made = [
                (index, first)
                for index, (start, length) in enumerate(self.spans)
                if (length == 1 and start > 0) == decode
                for first in range(0, length, step)
            ]
            if made:
                chunk, first = (torch.tensor(one, **whole) for one in zip(*made, strict=True))
                found.append(Tiles(chunk, first, rows, splits if decode else 1))
        return found

    def attended(self, splits: int = 1, tiles: list[Tiles] | None = None) -> Tensor:
        """Returns what the kernels give, ``[tokens, heads, head_dim]``; NaN where they wrote nothing."""
        shape = self.shape
        empty = {"fill_value": float("nan"), "device": shape.device}
        out = torch.full((len(self.qkv), shape.heads * shape.head_dim), dtype=shape.dtype, **empty)
        for tile in tiles or self.tiles(splits):
            count = len(tile.chunk) * shape.heads * splits
            room = Parts(*(torch.full((count * size,), **empty) for size in (shape.head_dim, 1, 1)))
            attend(self.qkv, self.keys, self.values, out, self.chunks, tile, self.scale, room)
        return out.view(-1, shape.heads, shape.head_dim)

    def loud(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values; what others left in a sequence's last block is no NaN there, but a loud number."""
        keys, values = self.keys.clone(), self.values.clone()
        for (start, length), own in zip(self.spans, self.blocks, strict=True):
            for part in (keys, values):
                part[own[-1], :, (start + length - 1) % self.shape.block_size + 1 :] = LOUD
        return keys, values

    def by_torch(self) -> Tensor:
        """Returns what the torch runner's attention gives, ``[tokens, heads, head_dim]``.

        It masks the rest of a last block after it has multiplied by it, so that there is no NaN but a loud number.
        """
        shape, device = self.shape, torch.device(self.shape.device)
        chunks = [
            (Sequence(uid, [0] * (start + length), start + length, 1, blocks=own), start, length, True)
            for uid, ((start, length), own) in enumerate(zip(self.spans, self.blocks, strict=True))
        ]
        plan = build_plan(RaggedBatch(chunks, 0, len(self.qkv)), [KvCache(*self.loud())], device)
        query = self.qkv.view(len(self.qkv), -1, shape.head_dim)[:, : shape.heads].transpose(0, 1)
        key, value = self.new
        found, _ = ragged_attention(Layer(), query[None], key[None], value[None], None, ragged=plan)
        return found[0]

    def bound(self, weight_roundings: int = 1) -> Tensor:
        """Returns how far rounding may take each result from the exact one.

        A weight and the result are rounded to the type once each: ``u * (sum of weights times absolute values +
        |result|)``; a weight below the type's normal numbers by half its least step. Scores and sums are float32: a
        score off by d makes a weight off by a factor of 1 + d, and so its sum; d is ``(head_dim + 4) * 2**-24`` of the
        largest sum of absolute products, and each step of the sums adds ``2**-24`` of all.

        Args:
            weight_roundings: how often a weight, or a weight times its value, is rounded to the type.
        """
        u = unit(self.shape.dtype)
        longest = max(start + length for start, length in self.spans)
        score = (self.shape.head_dim + 4) * SINGLE * self.sharpest
        sums = (longest + 16) * SINGLE
        least = torch.finfo(self.shape.dtype).smallest_normal * u * longest * 8
        return (weight_roundings * u + 2 * score + 2 * sums) * self.spread + u * self.expected.abs() + least

    def check(self, splits: int = 1) -> float:
        """Returns the largest distance of the kernels' results as a share of its bound; AssertionError above 1."""
        return near(self.attended(splits), self.expected, self.bound())

    def check_torch(self) -> float:
        """Returns the same of the torch runner's attention, which rounds each block's part of a result as well."""
        return near(self.by_torch(), self.expected, self.bound(2))

    def check_repeats(self, splits: int, times: int = 20) -> None:
        """Raises AssertionError where the same pass does not always give the same bits."""
        first = self.attended(splits)
        same = [torch.equal(first, self.attended(splits)) for _ in range(times)]
        assert all(same), f"{same.count(False)} of {times} repetitions gave other bits"

    def check_graph(self, splits: int) -> None:
        """Raises AssertionError where a CUDA graph of the pass gives something else than launching it."""
        launched = self.attended(splits)
        graph, tiles = torch.cuda.CUDAGraph(), self.tiles(splits)
        with torch.cuda.graph(graph):
            replayed = self.attended(splits, tiles)
        graph.replay()
        assert torch.equal(launched, replayed), "a graph gives other bits than launching"


class Layer(torch.nn.Module):
    """Stands for a decoder layer's attention, of which the number alone is looked at."""

    layer_idx = 0
