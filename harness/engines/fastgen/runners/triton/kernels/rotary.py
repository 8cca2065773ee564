"""Rotary embedding of a pass's queries and keys, and its keys and values into the paged cache, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels import OPTIONS

BLOCK_HEADS = 16


@triton.jit
def _head_norm(first, second, weight, lane, held, half, epsilon, kind: tl.constexpr):
    """RMSNorm over each head's two halves, rounded as Qwen3RMSNorm rounds."""
    square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    scale = tl.rsqrt(square / (2 * half) + epsilon)[:, None]
    low = tl.load(weight + lane, mask=held, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight + half + lane, mask=held, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(kind).to(tl.float32) * low).to(kind).to(tl.float32)
    second = ((second * scale).to(kind).to(tl.float32) * high).to(kind).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate_and_store_kernel(
    qkv, cosines, sines, positions, slots, keys, values, query_norm, key_norm, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """A program a token and BLOCK_HEADS heads: query heads first, then key heads, then value heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    lane = tl.arange(0, HALF_BLOCK)
    held = lane < HALF
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & held[None, :]
    at = qkv + (token * (HEADS + 2 * KV_HEADS) + head[:, None]) * (2 * HALF) + lane[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    kind: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    if NORMS:
        query_first, query_second = _head_norm(first, second, query_norm, lane, held, HALF, epsilon, kind)
        key_first, key_second = _head_norm(first, second, key_norm, lane, held, HALF, epsilon, kind)
        first = tl.where(is_query, query_first, tl.where(is_value, first, key_first))
        second = tl.where(is_query, query_second, tl.where(is_value, second, key_second))
    position = tl.load(positions + token).to(tl.int64)
    cosine = tl.load(cosines + position * HALF + lane, mask=held, other=1.0)[None, :]
    sine = tl.load(sines + position * HALF + lane, mask=held, other=0.0)[None, :]
    cosine = tl.where(is_value, 1.0, cosine)
    sine = tl.where(is_value, 0.0, sine)
    low = (first * cosine - second * sine).to(kind)
    high = (second * cosine + first * sine).to(kind)
    tl.store(at, low, mask=inside & is_query)
    tl.store(at + HALF, high, mask=inside & is_query)
    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key_head = head[:, None] - HEADS
    to = ((block * KV_HEADS + key_head) * BLOCK_SIZE + offset) * (2 * HALF) + lane[None, :]
    is_key = (key_head >= 0) & (key_head < KV_HEADS)
    tl.store(keys + to, low, mask=inside & is_key)
    tl.store(keys + to + HALF, high, mask=inside & is_key)
    to -= KV_HEADS * BLOCK_SIZE * 2 * HALF
    tl.store(values + to, low, mask=inside & is_value)
    tl.store(values + to + HALF, high, mask=inside & is_value)


def rotate_and_store(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> None:
    """Turns the queries of ``qkv`` in place, and stores turned keys, and values, in the cache.

    Args:
        qkv: ``[tokens, (heads + 2 * kv_heads) * head_dim]``, contiguous.
        cosines, sines: float32 ``[positions, head_dim / 2]``, scaled as the family scales them.
        positions: int32 ``[tokens]``.
        slots: int32 ``[tokens]`` where each token is stored: its block times the block size, plus its place in it.
        keys, values: one layer's cache, ``[blocks, kv_heads, block_size, head_dim]``, contiguous.
        norms: weights ``[head_dim]`` of an RMSNorm of each query and key head before they turn (qwen3), with
            ``epsilon``.
    """
    _, kv_heads, block_size, head_dim = keys.shape
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    query_norm, key_norm = norms if norms is not None else (qkv, qkv)
    rotate_and_store_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, BLOCK_HEADS))](
        qkv, cosines, sines, positions, slots, keys, values, query_norm, key_norm, epsilon,
        HEADS=heads, KV_HEADS=kv_heads, HALF=head_dim // 2, HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size, BLOCK_HEADS=BLOCK_HEADS, NORMS=norms is not None, num_warps=4, **OPTIONS,
    )  # fmt: skip
