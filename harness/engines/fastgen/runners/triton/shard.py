"""This rank's part of a model: how many of its heads, inner columns and vocabulary rows, and which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.models.architecture import attention_heads


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's share of a Llama-like decoder.

    Attributes:
        rank, tp: which of how many ranks.
        layers, hidden, head_dim, vocab: of the whole model.
        heads, kv_heads, inner: query heads, key-value heads and columns of the MLP that this rank has.
        first_kv_head: with more ranks than key-value heads, several have a copy of one.
        first_row, rows: of the output projection, a row a token of the vocabulary; the last rank may have fewer rows.
        row_share: rows of every rank but the last.
    """

    rank: int
    tp: int
    layers: int
    hidden: int
    head_dim: int
    vocab: int
    heads: int
    kv_heads: int
    first_kv_head: int
    inner: int
    first_row: int
    rows: int
    row_share: int

    @classmethod
    def of(cls, architecture: dict[str, Any], rank: int = 0, tp: int = 1) -> Shard:
        """Returns the share of ``rank`` in a model that :func:`~.checks.unsupported` lets through."""
        heads, kv_heads, head_dim = attention_heads(architecture)
        vocab, share = architecture["vocab_size"], row_share(architecture["vocab_size"], tp)
        return cls(
            rank=rank,
            tp=tp,
            layers=architecture["num_hidden_layers"],
            hidden=architecture["hidden_size"],
            head_dim=head_dim,
            vocab=vocab,
            heads=heads // tp,
            kv_heads=max(1, kv_heads // tp),
            first_kv_head=rank * kv_heads // tp,
            inner=architecture["intermediate_size"] // tp,
            first_row=rank * share,
            rows=min(share, vocab - rank * share),
            row_share=share,
        )

    @property
    def query_width(self) -> int:
        """Columns of this rank's queries."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Columns of this rank's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of this rank's queries, keys and values."""
        return self.query_width + 2 * self.key_width


def row_share(vocab: int, tp: int) -> int:
    """Returns the rows of the output projection that each rank has; the last has what is left."""
    return -(-vocab // tp)
