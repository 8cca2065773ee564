"""Made-up tokens: how many a request gets, and which, from its number alone, so that anyone can make them again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
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
    mixed = index * 0x9E3779B1 + 0x7F4A7C15
    ids = [((mixed ^ place * 0x85EBCA6B) * 0xC2B2AE35 >> 13) % usable for place in range(count)]
    for stop in stops:
        ids = [one + (one >= stop) for one in ids]
    if eos:
        ids[-1] = stops[0]
    return ids


def drawn_length(seed: int, index: int, rate: float) -> int:
    """Returns how many tokens a request gets, its end-of-sequence token included, if each is one with chance ``rate``.

    Geometric, drawn with a hash of seed and index.
    """
    if rate >= 1:
        return 1
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    uniform = (int.from_bytes(digest[:8], "big") + 1) / (2**64 + 1)
    return max(1, math.ceil(math.log(uniform) / math.log1p(-rate)))
