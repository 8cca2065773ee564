"""Made-up tokens: how many a request gets, and which, from its number alone, so that anyone can make them again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any


def stop_ids(architecture: Mapping[str, Any]) -> list[int]:
    """Returns the ids that end a sequence, by a model's config; id 0 where it names none."""
    found = architecture.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return sorted({one for one in ids if type(one) is int and one >= 0}) or [0]


def token_ids(index: int, count: int, eos: bool, vocab: int, stops: list[int]) -> list[int]:
    """Returns the ids of a request's output: a hash of its index and the position, ``stops`` left out.

    Args:
        eos: whether the last is the first of ``stops``.
        vocab: ids are below it.
    """
    usable = max(vocab - len(stops), 1)
    first = index * 0x9E3779B1 + 0x7F4A7C15
    ids = [(place >> 11) % usable for place in range(first, first + count * 0x85EBCA6B, 0x85EBCA6B)]
    for stop in stops:
        ids = [one if one < stop else one + 1 for one in ids]
    if eos:
        ids[-1] = stops[0]
    return ids


def drawn_length(seed: int, index: int, hazard: Sequence[tuple[int, float]]) -> int | None:
    """Returns how many tokens a request gets, its end-of-sequence token included; None where it would never end.

    Drawn with a hash of seed and index, by inverting the distribution: token ``n`` is reached with the product of
    ``1 - chance`` over the positions before it.

    Args:
        hazard: (first position, from 1; chance that a token from there on ends its sequence), ascending.
    """
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    left = -math.log((int.from_bytes(digest[:8], "big") + 1) / (2**64 + 1))
    for place, (first, rate) in enumerate(hazard):
        if rate >= 1:
            return first
        step = -math.log1p(-rate)
        end = hazard[place + 1][0] if place + 1 < len(hazard) else math.inf
        if step and left <= step * (end - first):
            return first - 1 + max(1, math.ceil(left / step))
        left -= step * (end - first) if step else 0.0
    return None
