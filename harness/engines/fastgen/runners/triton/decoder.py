"""One pass through a Llama-like decoder: matrix products by cuBLAS, all between them by our kernels.

It reads the plan on the device and nothing else, allocates nothing and waits for nothing, so that it can be captured in
a CUDA graph. Ten launches a layer where all tokens are decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engines.fastgen.runners.triton.buffers import Buffers
from harness.engines.fastgen.runners.triton.kernels.activation import silu_and_multiply
from harness.engines.fastgen.runners.triton.kernels.attention import attend
from harness.engines.fastgen.runners.triton.kernels.norm import add_rms_norm
from harness.engines.fastgen.runners.triton.kernels.rotary import rotate_and_store
from harness.engines.fastgen.runners.triton.kernels.sampling import argmax, choose, embed
from harness.engines.fastgen.runners.triton.plan import Plan, Planner
from harness.engines.fastgen.runners.triton.shard import Shard
from harness.engines.fastgen.runners.triton.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache: keys and values of each layer, ``[blocks + 1, kv_heads, block_size, head_dim]``.

    The last block is scratch: the padding of a graph writes there.
    """

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the ranks of a model do together.

    Attributes:
        add: adds up a tensor over the ranks, in place.
        gather: fills its first argument, ``[ranks, ...]``, with all ranks' second ones, ``[...]``, in order.
    """

    add: Callable[[Tensor], None]
    gather: Callable[[Tensor, Tensor], None]


class Decoder:
    """A rank's part of the model.

    Args:
        weights, shard: its weights.
        cosines, sines: float32 ``[positions, head_dim / 2]``.
        epsilon: of the norms.
        ranks: None where one has the whole model.
    """

    def __init__(
        self,
        weights: Weights,
        shard: Shard,
        buffers: Buffers,
        planner: Planner,
        cache: Cache,
        rotary: tuple[Tensor, Tensor],
        epsilon: float,
        ranks: Ranks | None,
    ) -> None:
        self.weights, self.shard, self.buffers, self.planner = weights, shard, buffers, planner
        self.cache, self.rotary, self.epsilon, self.ranks = cache, rotary, epsilon, ranks

    def choose(self, plan: Plan) -> None:
        """Computes a pass and leaves the greedy ids of its outputs in ``buffers.ids``."""
        self.layers(plan)
        if plan.outputs:
            self._pick(self.head(plan, self.buffers.logits))

    def head(self, plan: Plan, room: Tensor) -> Tensor:
        """Returns the logits of a pass's outputs, ``[outputs, rows]``, in ``room``; :meth:`layers` comes first."""
        count, buffers = plan.outputs, self.buffers
        residual, added = buffers.residual[:count], buffers.added[:count]
        if not plan.decodes:
            residual, added = self._gathered(plan)
        normed = buffers.normed[:count]
        add_rms_norm(added, residual, self.weights.norm, self.epsilon, normed)
        logits = room[: count * self.shard.rows].view(count, self.shard.rows)
        torch.mm(normed, self.weights.head.t(), out=logits)
        return logits

    def layers(self, plan: Plan) -> None:
        """Computes all layers; what the last one gives is not added to the residual yet."""
        buffers, planner = self.buffers, self.planner
        residual = buffers.residual[: plan.tokens]
        embed(planner.device["sources"][: plan.tokens], buffers.ids, self.weights.embedding, residual)
        added = None
        for layer, keys, values in zip(self.weights.layers, self.cache.keys, self.cache.values, strict=True):
            added = self._layer(plan, layer, keys, values, residual, added)

    def _layer(
        self, plan: Plan, layer: LayerWeights, keys: Tensor, values: Tensor, residual: Tensor, added: Tensor | None
    ) -> Tensor:
        buffers, tokens = self.buffers, plan.tokens
        normed, result = buffers.normed[:tokens], buffers.added[:tokens]
        add_rms_norm(added, residual, layer.attention_norm, self.epsilon, normed)
        qkv, attended = buffers.attention(tokens)
        _linear(normed, layer.qkv, layer.qkv_bias, qkv)
        positions, slots = (self.planner.device[name][:tokens] for name in ("positions", "slots"))
        rotate_and_store(qkv, *self.rotary, positions, slots, keys, values, layer.head_norms, self.epsilon)
        self._attend(plan, qkv, keys, values, attended)
        _linear(attended, layer.output, layer.output_bias, result)
        self._add_up(result)
        add_rms_norm(result, residual, layer.mlp_norm, self.epsilon, normed)
        gate_up, product = buffers.mlp(tokens)
        _linear(normed, layer.gate_up, None, gate_up)
        silu_and_multiply(gate_up, product)
        _linear(product, layer.down, None, result)
        self._add_up(result)
        return result

    def _attend(self, plan: Plan, qkv: Tensor, keys: Tensor, values: Tensor, attended: Tensor) -> None:
        buffers, planner = self.buffers, self.planner
        chunks, scale = planner.chunks(plan), self.shard.head_dim**-0.5
        if plan.singles:
            tiles = planner.singles(plan, buffers.splits(plan.singles))
            attend(qkv, keys, values, attended, chunks, tiles, scale, buffers.parts)
        if plan.tiles:
            attend(qkv, keys, values, attended, chunks, planner.tiles(plan), scale)

    def _gathered(self, plan: Plan) -> list[Tensor]:
        """Returns residual and result of the outputs alone."""
        rows, tokens = self.planner.device["outputs"][: plan.outputs], plan.tokens
        found = []
        for source, to in zip((self.buffers.residual, self.buffers.added), self.buffers.last, strict=True):
            to = to[: plan.outputs] if plan.outputs <= len(to) else to.new_empty(plan.outputs, to.shape[1])
            found.append(torch.index_select(source[:tokens], 0, rows, out=to))
        return found

    def _pick(self, logits: Tensor) -> None:
        buffers, count = self.buffers, len(logits)
        if self.ranks is None:
            argmax(logits, buffers.ids[:count], buffers.values[:count])
            return
        argmax(logits, buffers.mine[0, :count], buffers.mine[1, :count].view(torch.float32), self.shard.first_row)
        self.ranks.gather(buffers.all_best, buffers.mine)
        buffers.best.copy_(buffers.all_best.transpose(0, 1))
        choose(buffers.best[0], buffers.best[1].view(torch.float32), buffers.ids)

    def _add_up(self, result: Tensor) -> None:
        if self.ranks is not None:
            self.ranks.add(result)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(inputs, weight.t(), out=out)
    else:
        torch.addmm(bias, inputs, weight.t(), out=out)
