"""How many requests a case can have: as many as the simulator says that its share of the device's time is enough for.

FastGen's scheduler is replayed over assumed pass times (:mod:`harness.costs.pass_time`), with what is roughly known of
an engine: sequences at a time, seconds that launching a layer takes from Python. It has to be right within a factor of
two, no more: the case is timed, and what was predicted stands beside what it took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from harness.config.schema import HardwareConfig
from harness.costs.lengths import Lengths
from harness.costs.pass_time import PassTime
from harness.costs.shape import ModelShape
from harness.engines.simulate.replay import Item, Pass, Setup, replay

BLOCK_SIZE = 64
OWN_BYTES = 4 << 30  # of a device, beside weights and KV cache
LEAST = 4  # requests


@dataclass(frozen=True)
class Kind:
    """What the time of an engine rests on, roughly; measured are MII's and the loop's, on one H200.

    Attributes:
        layer_s: of a pass, for each layer: launches from Python that the device waits for.
        rows: sequences at a time; None for as many as the cache holds.
        budget: tokens of a pass.
        slower: the whole, times this.
    """

    layer_s: float
    rows: int | None = None
    budget: int = 4096
    slower: float = 1.0


TRITON = Kind(20e-6, slower=1.3)
DEEPSPEED = Kind(200e-6, slower=1.3)
MII = Kind(200e-6, budget=768, slower=1.5)
TORCH = Kind(1.2e-3, slower=1.5)  # an attention call a prompt
STATIC = Kind(0.8e-3, rows=16, slower=1.5)  # batches that run to their ends
GRAPHED = replace(STATIC, layer_s=60e-6)
ONE_BY_ONE = Kind(2.0e-3, rows=1)


class Choice(NamedTuple):
    """How many requests, and the seconds that they are predicted to take; None where nothing could be predicted."""

    requests: int
    predicted_s: float | None


def seconds(kind: Kind, found: Lengths, shape: ModelShape, hardware: HardwareConfig, dtype: str) -> float:
    """Returns what requests are predicted to take, once everything is loaded.

    Raises:
        UserError: a figure of the hardware is not known.
    """
    times = PassTime(shape, hardware, dtype, 1, 1)
    times = times.with_factors(launch_s=max(kind.layer_s, times.factors.launch_s))
    memory = hardware.memory_bytes or 0
    weights = shape.matrix_bytes + shape.other_bytes
    tokens = max(0.0, 0.9 * (memory - OWN_BYTES - weights)) / shape.kv_token_bytes
    longest = max(found.held) + 1
    blocks = max(int(tokens) // BLOCK_SIZE, -(-longest // BLOCK_SIZE) * (kind.rows or 16) + 1)
    setup = Setup(kind.budget, min(kind.rows or 1024, kind.budget), BLOCK_SIZE, blocks)
    ordered = sorted(found.items, key=lambda length: -length.output)
    items = [Item(number, prompt, output, output) for number, (prompt, output) in enumerate(ordered)]
    passes = (event for event in replay(items, setup, times) if isinstance(event, Pass))
    return kind.slower * max(one.started_s + one.seconds for one in passes)


def choose(wanted: int, allowed_s: float, predict: Callable[[int], float] | None, least: int = LEAST) -> Choice | None:
    """Returns the most requests, ``wanted`` or a half, a quarter, ... of them, that take at most ``allowed_s``.

    Args:
        predict: seconds of so many requests; None where nothing is known, and ``wanted`` are tried.
        least: fewer say nothing: None is returned where even they take longer.
    """
    if predict is None:
        return Choice(wanted, None)
    count = wanted
    while count >= min(least, wanted):
        took = predict(count)
        if took <= allowed_s:
            return Choice(count, took)
        count //= 2
    return None


def fewer(wanted: int, completed: int, took_s: float, allowed_s: float, least: int = LEAST) -> int | None:
    """Returns how many requests to try again with, when ``completed`` of them had taken all of ``took_s``.

    Half of what the rate allows: those that were running at the end are not counted, and the last take longer. None
    where that is too few, or no fewer than before.
    """
    if not took_s:
        return None
    count = int(completed * allowed_s / took_s / 2)
    return count if least <= count < wanted else None
