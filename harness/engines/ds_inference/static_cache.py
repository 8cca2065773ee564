"""Keys and values of a static batch, and attention over them, in plain PyTorch.

Prompts are padded on the left, so that all rows of a batch write their next token into the same column and
nothing has to be gathered or concatenated: the cache is made once for a batch, and a decode step attends over
a view of it. Rows that have finished are overwritten by the last one, so the live rows stay a prefix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from harness.engines.shared.attention_scores import scores
from harness.engines.shared.plain_attention import Probe

ATTENTION = "harness_static"


class StaticCache:
    """Room for ``rows`` sequences of ``width`` columns, padding included; :meth:`start` begins a batch.

    Args:
        fixed: always compute all rows over all columns in place, as a captured CUDA graph must; else what is live.
    """

    def __init__(self, rows: int, width: int, device: str, fixed: bool = False) -> None:
        self.rows = rows
        self.width = width
        self.fixed = fixed
        self.live = 0
        self.column = 0  # where the next token goes
        self.prompt_columns = 0
        self.begins: list[int] = []  # each row's first column; padding before it
        self.mask = torch.zeros(rows, width, device=device)  # added to scores: 0 for what a row sees, or -inf
        self.write_at = torch.zeros(1, dtype=torch.int64, device=device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._prefill: tuple[list[int], Tensor | None] | None = None

    def start(self, prompts: list[int]) -> None:
        """Begins a batch of prompts of these lengths; rows beyond them stand empty."""
        self.live = len(prompts)
        self.prompt_columns = self.column = max(prompts)
        self.begins = [self.column - length for length in prompts] + [self.column - 1] * (self.rows - len(prompts))
        begins = torch.tensor(self.begins)[:, None]
        columns = torch.arange(self.width)[None, :]
        hidden = (columns < begins) | (columns >= self.column)
        self.mask.copy_(torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf))

    def begin_prefill(self, rows: list[int], columns: int) -> None:
        """The next forward computes the prompts of ``rows``, padded on the left to ``columns``."""
        begins = torch.tensor([self.begins[row] - (self.prompt_columns - columns) for row in rows])
        mask = None
        if begins.any():
            mask = left_padded(begins, columns)[:, None].to(self.mask.device)
        self._prefill = (rows, mask)

    def begin_decode(self) -> None:
        """The next forward computes one token of each live row."""
        self._prefill = None
        self.mask[:, self.column] = 0.0
        self.write_at.fill_(self.column)
        self.column += 1

    def drop(self, row: int) -> int:
        """Gives up a finished row; returns the row that took its place (itself if it was the last)."""
        self.live -= 1
        last = self.live
        if row != last:
            for stored in (*self.keys, *self.values):
                stored[row, :, : self.column] = stored[last, :, : self.column]
            self.mask[row] = self.mask[last]
            self.begins[row] = self.begins[last]
        return last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores keys and values and returns ``[rows, heads, tokens, head_dim]`` for a query of that shape."""
        if layer == len(self.keys):
            shape = (self.rows, key.shape[1], self.width, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
        keys, values = self.keys[layer], self.values[layer]
        if self._prefill is not None:
            rows, mask = self._prefill
            into = slice(self.prompt_columns - key.shape[2], self.prompt_columns)
            keys[rows, :, into], values[rows, :, into] = key, value
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        if self.fixed:
            keys.index_copy_(2, self.write_at, key)
            values.index_copy_(2, self.write_at, value)
            return _attend(query, keys, values, self.mask, scale)
        begin = min(self.begins[: self.live])
        seen = (slice(self.live), slice(None), slice(begin, self.column))
        keys[: self.live, :, self.column - 1] = key[:, :, 0]
        values[: self.live, :, self.column - 1] = value[:, :, 0]
        return _attend(query, keys[seen], values[seen], self.mask[: self.live, begin : self.column], scale)


def left_padded(begins: Tensor, columns: int) -> Tensor:
    """Returns what each token of prompts padded on the left sees, bool ``[rows, columns, columns]``.

    Args:
        begins: ``[rows]`` each prompt's first column.
    """
    place = torch.arange(columns)
    sees = (place[None, :] <= place[:, None])[None] & (place[None, None, :] >= begins[:, None, None])
    # Padding sees itself: a softmax over nothing would be NaN, and spread.
    return sees | torch.eye(columns, dtype=torch.bool)[None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Returns ``[rows, heads, 1, head_dim]``: one token a row over ``[rows, kv_heads, columns, head_dim]``.

    ``mask`` is ``[rows, columns]``. Query heads of one key-value head are computed as one matrix product.
    """
    rows, heads, _, head_dim = query.shape
    grouped = query.view(rows, keys.shape[1], heads // keys.shape[1], head_dim)
    scored = scores(grouped, keys).mul_(scale).add_(mask[:, None, None])
    weights = torch.softmax(scored, -1).to(values.dtype)
    return torch.matmul(weights, values).view(rows, heads, 1, head_dim)


def static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    static: StaticCache | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a :class:`StaticCache`, handed to the model's ``forward`` as ``static``.

    Args:
        query: ``[rows, heads, tokens, head_dim]``; key and value with ``kv_heads``.
        attention_mask: not used; what a token sees follows from the cache.

    Returns:
        ``[rows, tokens, heads, head_dim]`` and None for the weights.
    """
    if static is None:
        raise ValueError("the model does not hand its attention the cache of a batch")
    if isinstance(static, Probe):
        return static.note(module, query, key, value, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = static.attend(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
    return attended.transpose(1, 2).contiguous(), None
