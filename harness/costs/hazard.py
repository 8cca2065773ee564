"""How likely an output token is an end-of-sequence token, by its position in the output."""

from __future__ import annotations

from collections.abc import Iterable


def eos_hazard(outputs: Iterable[tuple[int, bool]]) -> list[tuple[int, float]]:
    """Returns (first position, chance) for bins of positions 1, 2 to 3, 4 to 7 and so on.

    The chance is that a token there ends its sequence, if it has come so far: ends over tokens, of which those that
    were cut off at their limit count as tokens alone (Kaplan and Meier, 1958, in bins). Bins beyond the longest output
    are not there; a request that gets so far has the last one's.

    Args:
        outputs: tokens of an output, its end-of-sequence token included, and whether it ended with one.
    """
    tokens: list[int] = []
    ends: list[int] = []
    for count, ended in outputs:
        for place in range(count.bit_length()):  # bin place holds positions 2**place to 2**(place + 1) - 1
            if place == len(tokens):
                tokens.append(0)
                ends.append(0)
            tokens[place] += min(count, 2 ** (place + 1) - 1) - 2**place + 1
        if ended and count:
            ends[count.bit_length() - 1] += 1
    return [(2**place, ends[place] / tokens[place]) for place in range(len(tokens))]
