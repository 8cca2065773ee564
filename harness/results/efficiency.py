"""What a run's tokens cost: joules, and money where the config says what a device costs."""

from __future__ import annotations

from typing import Any


def efficiency(record: dict[str, Any]) -> dict[str, float | None]:
    """Returns ``cost``, in the currency of the price, and the columns that follow from tokens, energy and cost.

    Args:
        record: of a run, its figures complete.
    """
    tokens, energy_j, money = record.get("total_tokens"), record.get("energy_j"), cost(record)
    return {
        "cost": money,
        "tokens_per_joule": tokens / energy_j if tokens and energy_j else None,
        "cost_per_million_tokens": money / tokens * 1e6 if tokens and money is not None else None,
    }


def cost(record: dict[str, Any]) -> float | None:
    """Returns the price of the run's devices over its clock; None where one of its segments does not tell."""
    total = 0.0
    for part in record.get("segments") or [record]:
        if part.get("elapsed_s") == 0:
            continue  # it ended before its clock started
        price = ((part.get("config") or {}).get("hardware") or {}).get("price_per_hour")
        known: tuple[Any, ...] = (price, part.get("devices"), part.get("elapsed_s"))
        if None in known:
            return None
        total += money(*known)
    return total


def money(price_per_hour: float, devices: int, seconds: float) -> float:
    """Returns what devices cost for so long, in the currency of the price of one."""
    return price_per_hour * devices * seconds / 3600
