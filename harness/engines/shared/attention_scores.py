"""Attention's scores in float32, whatever the type of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """Returns ``query @ keys^T``, float32 ``[n, kv_heads, group, columns]``.

    A product of half-precision tensors would come out rounded to their type, and what is rounded before the softmax
    is an error of its exponents: 0.06 at a score of 16 in bfloat16. On CUDA the tensor cores add up in float32 anyway
    and need only give that; a CPU has no such product, and its halves are made float32 first.

    Args:
        query: ``[n, kv_heads, group, head_dim]``.
        keys: ``[n, kv_heads, columns, head_dim]``.
    """
    if query.is_cuda and query.dtype is not torch.float32:
        flat = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.view(*query.shape[:3], keys.shape[2])
    return torch.matmul(query.float(), keys.float().transpose(2, 3))
