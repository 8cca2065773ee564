"""Perplexity of an engine on the prompts of a dataset."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from harness.basics.errors import UserError
from harness.engines.scoring import Score, Scored
from harness.results.completions import percentile


def items(prompts: Sequence[list[int]], bos: int | None) -> list[Scored]:
    """Returns what is to be scored of each prompt: every token after BOS, or where there is none after the first.

    Args:
        prompts: their ids, as the tokenizer gave them; it may have put BOS first, which is not scored.
        bos: the tokenizer's beginning-of-sequence id, None where it has none.
    """
    scored = []
    for index, ids in enumerate(prompts):
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        scored.append(Scored(index, ids[:1], ids[1:]))
    return scored


def fingerprint(scored: Sequence[Scored]) -> str:
    """Returns 16 hex digits that are equal where the same tokens are scored after the same tokens."""
    digest = hashlib.sha256()
    for item in scored:
        digest.update(json.dumps([item.context_ids, item.target_ids]).encode())
    return digest.hexdigest()[:16]


def per_request(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Returns ``index``, ``tokens``, ``logprob`` (their sum, nats) and ``perplexity`` of each, or why there is none."""
    lines: list[dict[str, Any]] = []
    for score in scores:
        if score.error is not None:
            lines.append({"index": score.index, "error": score.error})
            continue
        total, tokens = math.fsum(score.logprobs), len(score.logprobs)
        lines.append(
            {"index": score.index, "tokens": tokens, "logprob": total, "perplexity": exponential(-total / tokens)}
        )
    return lines


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the perplexity of all tokens together, their number, and how the prompts' own spread.

    Raises:
        UserError: nothing was scored.
    """
    done = [line for line in lines if "error" not in line]
    if not done:
        raise UserError("dataset", f"none of its {len(lines)} prompts could be scored: {lines[0]['error']}")
    tokens, total = sum(line["tokens"] for line in done), math.fsum(line["logprob"] for line in done)
    each = [line["perplexity"] for line in done]
    return {
        "requests": len(lines),
        "scored": len(done),
        "tokens": tokens,
        "logprob": total,
        "perplexity": exponential(-total / tokens),
        "request_perplexity_p50": percentile(each, 50),
        "request_perplexity_max": max(each),
    }


def exponential(value: float) -> float:
    """Returns e to the power of ``value``, infinity where that is too large."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
