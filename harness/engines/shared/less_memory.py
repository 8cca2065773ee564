"""Which settings to lower, and to what, when memory ran out; from a record, in which nothing is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.config.checks import parse_bytes
from harness.engines.room import Change
from harness.engines.shared.kv_memory import is_fraction


def halved(engine: Mapping[str, Any], *keys: str) -> list[Change]:
    """Returns half of each of these settings, as far as they are more than 1."""
    known = ((key, engine.get(key)) for key in keys)
    return [(f"engine.{key}", now // 2, now) for key, now in known if isinstance(now, int) and now > 1]


def of_paged(engine: Mapping[str, Any], phase: object) -> list[Change]:
    """Returns what an engine with a paged KV cache may lower: its passes, and the cache."""
    changes = [] if phase == "cache" else _smaller_passes(engine)
    if (less := _half_the_cache(engine.get("kv_memory"))) is not None:
        changes.append(("engine.kv_memory", less, engine["kv_memory"]))
    return changes


def _smaller_passes(engine: Mapping[str, Any]) -> list[Change]:
    """Half the tokens of a pass, but one for each sequence; if that is no less, half the sequences."""
    budget, sequences = engine.get("token_budget"), engine.get("max_sequences")
    if not isinstance(budget, int) or not isinstance(sequences, int):
        return []
    if (less := max(budget // 2, sequences)) < budget:
        return [("engine.token_budget", less, budget)]
    return halved(engine, "max_sequences", "token_budget")


def _half_the_cache(setting: object) -> object:
    """Returns ``engine.kv_memory`` halved, in the unit in which it was given; None where it is nothing known."""
    try:
        assert isinstance(setting, int | float | str)
        amount = parse_bytes(setting)
        if not isinstance(setting, str) or is_fraction(setting):
            return f"{amount / 2:g}" if amount <= 1 else int(amount // 2)
    except (AssertionError, ValueError):
        return None
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if amount / 2 >= size:
            return f"{amount / 2 / size:.4g}{unit}"
    return int(amount // 2)
