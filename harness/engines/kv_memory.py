"""``engine.kv_memory``: what the setting asks for, and the refusal of what cannot be."""

from __future__ import annotations

from harness.config import parse_bytes
from harness.errors import UserError


def is_fraction(setting: float | int | str) -> bool:
    """Whether the setting is a share of the free memory: a number up to 1, without a unit."""
    has_unit = isinstance(setting, str) and setting.strip()[-1].isalpha()
    return parse_bytes(setting) <= 1 and not has_unit


def kv_memory_bytes(setting: float | int | str, free_memory: int) -> int:
    """Returns ``engine.kv_memory`` in bytes: up to 1 it is a fraction of ``free_memory``, else bytes."""
    amount = parse_bytes(setting)
    return int(amount * free_memory) if is_fraction(setting) else int(amount)


def too_much(setting: float | int | str, asked: float, free: int, where: str = "") -> UserError:
    """Returns the refusal of more memory than there is; ``asked`` and ``free`` in bytes."""
    found = f"{setting} asks for {asked / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free{where}"
    return UserError("engine.kv_memory", found, "give less, or a fraction such as 0.5")


def too_little(
    setting: float | int | str, asked: int, block_size: int, block_bytes: int, remedy: str = "give more memory"
) -> UserError:
    """Returns the refusal of ``asked`` bytes, which do not hold a block of ``block_size`` tokens."""
    found = f"{setting} is {asked} bytes, less than one block of {block_size} tokens ({block_bytes} bytes)"
    return UserError("engine.kv_memory", found, remedy)
