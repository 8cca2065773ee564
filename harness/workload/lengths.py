"""How long prompts and outputs are where ``dataset.input_len`` or ``dataset.output_len`` says it: a number, a
distribution, or what another file has.

Draws rest on ``random.Random.random`` alone, whose sequence Python promises to keep: a seed means the same lengths in
every version.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from harness.basics.errors import UserError, quoted
from harness.workload.records import MAX_LENGTH

MAX_SIGMA = 10.0  # one standard deviation is then a factor of 22,000
NUMBER = f"give a whole number from 1 to {MAX_LENGTH:,}"
_WHOLE = re.compile(r"[0-9]{1,9}")

Item = TypeVar("Item")
Draw = Callable[[random.Random], int]


class Length(NamedTuple):
    """Tokens of a prompt or an output; where a file does not say them, the text whose tokens count."""

    tokens: int | None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Lengths that are drawn, one a request.

    Attributes:
        draw: returns the next length, of at least 1 token.
        most: tokens of the longest that can be drawn.
    """

    draw: Draw
    most: int

    def lengths(self, seed: int, key: str) -> Iterator[int]:
        """Yields lengths without end, the same ones for the same seed and key of ``conf/dataset``."""
        rng = random.Random(f"{seed} {key}")
        while True:
            yield self.draw(rng)


@dataclass(frozen=True, slots=True)
class OfFile:
    """Lengths of another dataset file, in turn."""

    path: str


Lengths = int | Spread | OfFile


def parse(field: str, value: object) -> Lengths:
    """Returns what a length key asks for; raises UserError where it is none."""
    if type(value) is int:
        if 1 <= value <= MAX_LENGTH:
            return value
        raise UserError(field, f"{value} is out of range", NUMBER)
    if isinstance(value, str):
        kind, _, rest = value.partition(":")
        if kind == "file" and rest:
            return OfFile(rest)
        found = {"uniform": _uniform, "lognormal": _lognormal}.get(kind, _none)(rest.split(":"))
        if found is not None:
            return found
    remedy = f"{NUMBER}, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or file:PATH"
    raise UserError(field, f"{quoted(value)} is no length", remedy)


def _none(parts: list[str]) -> Spread | None:
    return None


def _uniform(parts: list[str]) -> Spread | None:
    if len(parts) != 2 or not all(map(_WHOLE.fullmatch, parts)):
        return None
    low, high = map(int, parts)
    if not 1 <= low <= high <= MAX_LENGTH:
        return None
    return Spread(lambda rng: low + int(rng.random() * (high - low + 1)), high)


def _lognormal(parts: list[str]) -> Spread | None:
    try:
        median, sigma = map(float, parts)
    except ValueError:
        return None
    if not (1 <= median <= MAX_LENGTH and 0 <= sigma <= MAX_SIGMA):
        return None

    def draw(rng: random.Random) -> int:
        # Box and Muller's normal deviate; 1 - random() is never 0.
        normal = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
        return round(min(max(median * math.exp(min(sigma * normal, 100.0)), 1), MAX_LENGTH))

    return Spread(draw, MAX_LENGTH)


def fitted(prompt: int, output: int, drawn: Collection[str], context: int | None) -> tuple[int, int]:
    """Returns the tokens of a prompt and its output, those of them that were drawn cut to the model's context.

    The output is cut before the prompt. What was given as a number stays, and is rejected when the request is run.

    Args:
        drawn: ``input_len``, ``output_len`` or both.
        context: longest prompt plus output, None where there is no limit.
    """
    if context is None or prompt + output <= context:
        return prompt, output
    if "output_len" in drawn:
        output = max(1, context - prompt)
    if "input_len" in drawn:
        prompt = min(prompt, max(1, context - output))
    return prompt, output


def shuffled(items: list[Item], seed: int) -> list[Item]:
    """Returns ``items`` in an order that depends on ``seed`` and their number alone."""
    rng = random.Random(f"{seed} shuffle")
    places = [rng.random() for _ in items]
    return [items[place] for place in sorted(range(len(items)), key=places.__getitem__)]
