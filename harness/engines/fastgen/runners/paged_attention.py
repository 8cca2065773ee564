"""Attention over a paged KV cache for a ragged batch, in plain PyTorch.

One call a layer serves all tokens of a pass. Sequences with one new token (decodes) are computed together,
in place over the cache's blocks: each block gives a partial softmax, and the partials of one sequence are
combined afterwards ("flash-decoding"; Dao et al., 2023). Nothing is gathered or padded to the longest
sequence. Prompt chunks run through ``scaled_dot_product_attention`` one by one.

Measured on one core, fp32, 64 decodes of 330 tokens on average, 9 query and 3 KV heads of 64: 8.7 ms a layer,
against 10.2 ms for one SDPA call a sequence on contiguous keys and values (results/NOTES.md has more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from harness.engines.fastgen.batch import RaggedBatch
from harness.engines.shared.attention_scores import scores
from harness.engines.shared.plain_attention import Probe

MASKED = -1e30  # finite, so that a block of masked scores gives weight 0 and never NaN


@dataclass(slots=True)
class KvCache:
    """One layer's keys and values, each ``[blocks, kv_heads, block_size, head_dim]``."""

    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class Decodes:
    """All chunks of one token.

    Attributes:
        rows: ``[n]`` where they stand in the pass.
        blocks: the cache blocks attended over: a prefix of the pool, or the numbers ``[m]`` of single ones.
        owner: ``[m]`` which decode each block belongs to; ``n`` for a block in the prefix that is no decode's.
        order: ``[b]`` the places, among the ``m``, of the blocks that are a decode's, one decode after the other.
        counts: ``[n]`` how many of them each decode has.
        mask: ``[m, 1, 1, block_size]`` float32, 0 where a token stands and ``MASKED`` elsewhere.
    """

    rows: Tensor
    blocks: slice | Tensor
    owner: Tensor
    order: Tensor
    counts: Tensor
    mask: Tensor


@dataclass(slots=True)
class Prompt:
    """A chunk of several tokens, at rows ``begin:end`` of the pass.

    Attributes:
        blocks: ``[b]`` the sequence's blocks, or None when the chunk starts the sequence and so sees only itself.
        visible: keys to attend over, the chunk's own included.
        mask: ``[end - begin, visible]`` bool, or None with ``blocks``.
    """

    begin: int
    end: int
    blocks: Tensor | None
    visible: int
    mask: Tensor | None


@dataclass(slots=True)
class RaggedPlan:
    """What every layer needs to know of a pass; built once, used by all.

    Attributes:
        caches: one a layer.
        write_block, write_offset: ``[tokens]`` where each token's keys and values are stored.
    """

    caches: list[KvCache]
    write_block: Tensor
    write_offset: Tensor
    decodes: Decodes | None
    prompts: list[Prompt]


def build_plan(batch: RaggedBatch, caches: list[KvCache], device: torch.device) -> RaggedPlan:
    """Returns the plan of ``batch`` over ``caches``, its index tensors on ``device``."""
    block_size = caches[0].keys.shape[2]
    write_block: list[int] = []
    write_offset: list[int] = []
    prompts: list[Prompt] = []
    rows: list[int] = []
    visible: list[int] = []
    held: list[list[int]] = []
    for sequence, start, length, _ in batch.chunks:
        begin = len(write_block)
        end = start + length
        if length == 1:
            rows.append(begin)
            visible.append(end)
            held.append(sequence.blocks)
            write_block.append(sequence.blocks[start // block_size])
            write_offset.append(start % block_size)
            continue
        for position in range(start, end):
            write_block.append(sequence.blocks[position // block_size])
            write_offset.append(position % block_size)
        if start == 0:
            prompts.append(Prompt(begin, begin + length, None, length, None))
        else:
            blocks = torch.tensor(sequence.blocks[: -(-end // block_size)], device=device)
            positions = torch.arange(start, end, device=device)
            mask = torch.arange(end, device=device)[None, :] <= positions[:, None]
            prompts.append(Prompt(begin, begin + length, blocks, end, mask))
    return RaggedPlan(
        caches=caches,
        write_block=torch.tensor(write_block, device=device),
        write_offset=torch.tensor(write_offset, device=device),
        decodes=_plan_decodes(rows, visible, held, block_size, device) if rows else None,
        prompts=prompts,
    )


def _plan_decodes(
    rows: list[int], visible: list[int], held: list[list[int]], block_size: int, device: torch.device
) -> Decodes:
    blocks: list[int] = []
    owner: list[int] = []
    filled: list[int] = []
    counts: list[int] = []
    for decode, (tokens, own) in enumerate(zip(visible, held, strict=True)):
        count = -(-tokens // block_size)
        blocks += own[:count]
        owner += [decode] * count
        counts.append(count)
        filled += [block_size] * (count - 1)
        filled.append(tokens - (count - 1) * block_size)
    prefix = max(blocks) + 1
    shared = len(set(blocks)) < len(blocks)  # by several decodes, and in place a block has one owner
    chosen: slice | Tensor
    # Mostly ours: computing a few foreign blocks is cheaper than copying our own.
    if prefix <= 2 * len(blocks) and not shared:
        chosen = slice(0, prefix)
        owners = torch.full((prefix,), len(rows))
        lengths = torch.zeros(prefix, dtype=torch.int64)
        order = where = torch.tensor(blocks)
        owners[where] = torch.tensor(owner)
        lengths[where] = torch.tensor(filled)
    else:
        chosen = torch.tensor(blocks, device=device)
        owners, lengths, order = torch.tensor(owner), torch.tensor(filled), torch.arange(len(blocks))
    mask = torch.zeros(len(owners), block_size).masked_fill_(
        torch.arange(block_size)[None, :] >= lengths[:, None], MASKED
    )
    return Decodes(
        rows=torch.tensor(rows, device=device),
        blocks=chosen,
        owner=owners.to(device),
        order=order.to(device),
        counts=torch.tensor(counts, device=device),
        mask=mask[:, None, None, :].to(device),
    )


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    ragged: RaggedPlan | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stores a pass's keys and values and attends over the cache; transformers' attention interface.

    Args:
        module: the decoder layer's attention; its ``layer_idx`` picks the cache.
        query: ``[1, heads, tokens, head_dim]``.
        key, value: ``[1, kv_heads, tokens, head_dim]``.
        attention_mask: not used; what a token sees follows from the plan.
        scaling: factor of the scores.
        ragged: the plan, handed to the model's ``forward`` by the runner.

    Returns:
        ``[1, tokens, heads, head_dim]`` and None for the weights.
    """
    if ragged is None:
        raise ValueError("the model does not hand its attention the plan of a pass")
    if isinstance(ragged, Probe):
        return ragged.note(module, query, key, value, attention_mask, kwargs)
    cache = ragged.caches[int(module.layer_idx)]  # type: ignore[arg-type]
    cache.keys[ragged.write_block, :, ragged.write_offset] = key[0].transpose(0, 1)
    cache.values[ragged.write_block, :, ragged.write_offset] = value[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
    if ragged.decodes is not None:
        output[ragged.decodes.rows] = _attend_decodes(query[0], cache, ragged.decodes, scale)
    for prompt in ragged.prompts:
        begin, end = prompt.begin, prompt.end
        attended = _attend_prompt(
            query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end], cache, prompt, scale
        )
        output[begin:end] = attended[0].transpose(0, 1)
    return output[None], None


def _attend_decodes(query: Tensor, cache: KvCache, decodes: Decodes, scale: float) -> Tensor:
    """Returns ``[n, heads, head_dim]`` for a query ``[heads, tokens, head_dim]``."""
    keys, values = cache.keys[decodes.blocks], cache.values[decodes.blocks]
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    count, owner = len(decodes.rows), decodes.owner
    queries = query.new_zeros(count + 1, kv_heads, query.shape[0] // kv_heads, head_dim)
    queries[:count] = query[:, decodes.rows].transpose(0, 1).view(count, *queries.shape[1:])
    # [m, kv_heads, group, block_size], then over sequences: [n + 1, kv_heads, group]
    scored = torch.add(decodes.mask, scores(queries[owner], keys), alpha=scale)
    block_peak = scored.amax(-1)
    peak = block_peak.new_full((count + 1, *block_peak.shape[1:]), MASKED)
    peak.scatter_reduce_(0, owner[:, None, None].expand_as(block_peak), block_peak, "amax")
    weights = scored.sub_(peak[owner][..., None]).exp_()
    summed = by_segment if query.is_cuda else by_index
    total = summed(weights.sum(-1), decodes)
    attended = summed(torch.matmul(weights.to(values.dtype), values).float(), decodes)
    return (attended / total[..., None]).to(query.dtype).flatten(1, 2)


def by_index(parts: Tensor, decodes: Decodes) -> Tensor:
    """Returns the sum of each decode's blocks, ``[n, ...]`` of ``[m, ...]``: on a CPU, block after block."""
    count = len(decodes.rows)
    return parts.new_zeros(count + 1, *parts.shape[1:]).index_add_(0, decodes.owner, parts)[:count]


def by_segment(parts: Tensor, decodes: Decodes) -> Tensor:
    """Returns the same on CUDA, where ``index_add_`` would add by atomics, and so in another order in every run.

    ``segment_reduce`` goes through a segment in its order; it is told not to check the counts, which would wait for
    the device.
    """
    return torch.segment_reduce(parts[decodes.order], "sum", lengths=decodes.counts, axis=0, unsafe=True)


def _attend_prompt(query: Tensor, key: Tensor, value: Tensor, cache: KvCache, prompt: Prompt, scale: float) -> Tensor:
    """Returns ``[1, heads, chunk, head_dim]`` for a chunk's ``[1, heads, chunk, head_dim]`` queries."""
    if prompt.blocks is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    keys, values = (
        # [blocks, kv_heads, block_size, head_dim] -> [1, kv_heads, visible, head_dim]
        stored[prompt.blocks].transpose(0, 1).flatten(1, 2)[None, :, : prompt.visible]
        for stored in (cache.keys, cache.values)
    )
    return scaled_dot_product_attention(query, keys, values, attn_mask=prompt.mask, scale=scale, enable_gqa=True)
