"""The weights as the pass multiplies by them: query, key and value in one matrix, gate and up in one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engines.fastgen.runners.triton.shard import Shard
from harness.models.tensors import HEAD, Part

EMBEDDING = "model.embed_tokens.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's, a matrix ``[out, in]``.

    Attributes:
        qkv: ``[(heads + 2 * kv_heads) * head_dim, hidden]``.
        qkv_bias: None where the model has none.
        output: ``[hidden, heads * head_dim]``.
        output_bias: on rank 0 alone, for the ranks' results are added up.
        gate_up: ``[2 * inner, hidden]``, the gate's rows first.
        down: ``[hidden, inner]``.
        attention_norm, mlp_norm: ``[hidden]``.
        head_norms: ``[head_dim]`` of each query and of each key head (qwen3), or None.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class Weights:
    """A rank's.

    Attributes:
        embedding: ``[vocab, hidden]``, whole.
        layers: in order.
        norm: ``[hidden]``.
        head: ``[rows, hidden]`` of this rank's part of the vocabulary; of tied weights a view of ``embedding``.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


def empty(shard: Shard, names: Collection[str], dtype: torch.dtype, device: torch.device) -> Weights:
    """Returns room for a rank's weights, all that there will be of them on the device.

    Args:
        names: of the checkpoint's tensors: which biases and norms there are.
    """

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer(prefix: str) -> LayerWeights:
        has_output_bias = f"{prefix}self_attn.o_proj.bias" in names and shard.rank == 0
        has_norms = f"{prefix}self_attn.q_norm.weight" in names
        return LayerWeights(
            qkv=room(shard.qkv_width, shard.hidden),
            qkv_bias=room(shard.qkv_width) if f"{prefix}self_attn.q_proj.bias" in names else None,
            output=room(shard.hidden, shard.query_width),
            output_bias=room(shard.hidden) if has_output_bias else None,
            gate_up=room(2 * shard.inner, shard.hidden),
            down=room(shard.hidden, shard.inner),
            attention_norm=room(shard.hidden),
            mlp_norm=room(shard.hidden),
            head_norms=(room(shard.head_dim), room(shard.head_dim)) if has_norms else None,
        )

    embedding = room(shard.vocab, shard.hidden)
    own = slice(shard.first_row, shard.first_row + shard.rows)
    return Weights(
        embedding=embedding,
        layers=[layer(_prefix(number)) for number in range(shard.layers)],
        norm=room(shard.hidden),
        head=room(shard.rows, shard.hidden) if HEAD in names else embedding[own],
    )


def parts(weights: Weights, shard: Shard, names: Collection[str]) -> Iterator[Part]:
    """Yields which part of which tensor of the checkpoint goes where; each element of ``weights`` is filled once."""
    yield Part(EMBEDDING, weights.embedding)
    yield Part("model.norm.weight", weights.norm)
    if HEAD in names:
        yield Part(HEAD, weights.head, 0, shard.first_row)
    for number, layer in enumerate(weights.layers):
        yield from _layer_parts(_prefix(number), layer, shard)


def _layer_parts(prefix: str, layer: LayerWeights, shard: Shard) -> Iterator[Part]:
    widths = (shard.query_width, shard.key_width, shard.key_width)
    first_key = shard.first_kv_head * shard.head_dim
    begins = (shard.rank * shard.query_width, first_key, first_key)
    for name, whole in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if whole is not None:
            for projection, to, begin in zip(PROJECTIONS, whole.split(widths), begins, strict=True):
                yield Part(f"{prefix}self_attn.{projection}.{name}", to, 0, begin)
    yield Part(f"{prefix}self_attn.o_proj.weight", layer.output, 1, shard.rank * shard.query_width)
    if layer.output_bias is not None:
        yield Part(f"{prefix}self_attn.o_proj.bias", layer.output_bias)
    for projection, to in zip(("gate_proj", "up_proj"), layer.gate_up.split(shard.inner), strict=True):
        yield Part(f"{prefix}mlp.{projection}.weight", to, 0, shard.rank * shard.inner)
    yield Part(f"{prefix}mlp.down_proj.weight", layer.down, 1, shard.rank * shard.inner)
    yield Part(f"{prefix}input_layernorm.weight", layer.attention_norm)
    yield Part(f"{prefix}post_attention_layernorm.weight", layer.mlp_norm)
    for name, norm in zip(("q_norm", "k_norm"), layer.head_norms or (), strict=False):
        yield Part(f"{prefix}self_attn.{name}.weight", norm)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."
