"""``engine.kv_memory``: what the setting asks for, and the refusal of what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.basics.errors import UserError
from harness.config.checks import parse_bytes
from harness.costs.memory import near_bytes
from harness.machine import numa
from harness.machine.memory import available_memory_bytes

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings


def free_memory(settings: EngineSettings) -> int:
    """Returns the bytes that this rank may still take: of its GPU, or its share of the host's.

    Of a rank that is bound to NUMA nodes a fraction is meant of what they have: the rest of the host's is slow. Bytes
    that are given may lie anywhere.
    """
    if settings.device == "cpu":
        free, place = available_memory_bytes() // settings.host_ranks, settings.place
        if place is None or not place.nodes or not is_fraction(getattr(settings.engine, "kv_memory", 1)):
            return free
        return near_bytes(free, numa.free_bytes(place.nodes) // place.ranks)
    import torch

    return torch.cuda.mem_get_info(settings.device)[0]


def is_fraction(setting: float | int | str) -> bool:
    """Whether the setting is a share of the free memory: a number up to 1, without a unit."""
    has_unit = isinstance(setting, str) and setting.strip()[-1].isalpha()
    return parse_bytes(setting) <= 1 and not has_unit


def kv_memory_bytes(setting: float | int | str, free_memory: int) -> int:
    """Returns ``engine.kv_memory`` in bytes: up to 1 it is a fraction of ``free_memory``, else bytes."""
    amount = parse_bytes(setting)
    return int(amount * free_memory) if is_fraction(setting) else int(amount)


def affordable_blocks(setting: float | int | str, free: int, max_blocks: int, block_size: int, block_bytes: int) -> int:
    """Returns how many blocks ``engine.kv_memory`` buys, at most ``max_blocks``.

    Args:
        free: bytes that can be had.
        block_size: tokens in a block, which has ``block_bytes`` bytes.

    Raises:
        UserError: the memory is not there, or does not hold one block.
    """
    asked = kv_memory_bytes(setting, free)
    blocks = min(max_blocks, asked // block_bytes)
    if blocks * block_bytes > free:
        raise too_much(setting, asked, free)
    if blocks < 1:
        remedy = "give more memory, or a smaller engine.kv_block_size"
        raise too_little(setting, asked, block_size, block_bytes, remedy)
    return blocks


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
