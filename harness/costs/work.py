"""What one forward pass has to do: tokens, keys and rows, and from a model's shape FLOPs and bytes."""

from __future__ import annotations

from typing import NamedTuple


class PassWork(NamedTuple):
    """One pass of a replica, in counts that do not depend on the model.

    Attributes:
        tokens: all tokens that are fed, ``prompt_tokens`` and ``decode_tokens``, drafts among these.
        sequences: whose tokens they are.
        logit_rows: tokens after which an id is given: of each sequence the newest, and its drafts.
        kv_read_tokens: keys that are read from the cache, each sequence's once: start + length of its chunk.
        attention_pairs: of a token and a key that it sees.
    """

    tokens: int
    prompt_tokens: int
    decode_tokens: int
    sequences: int
    logit_rows: int
    kv_read_tokens: int
    attention_pairs: int
