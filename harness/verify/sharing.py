"""What a run says that its prompts shared, against the prompts themselves and against its own sums."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from harness.basics.errors import one_line
from harness.verify.runs import RecordedRun

KEY, STATISTIC = "prefix_sharing", "shared_prompt_tokens"


def tokens_of(line: dict[str, Any]) -> int:
    """Returns how many tokens of a completion's prompt were not computed, by itself; 0 where it says nothing usable."""
    value = line.get("shared_tokens")
    return value if type(value) is int and value > 0 else 0


def check(
    run: RecordedRun, completed: list[dict[str, Any]], prompts: dict[int, list[int]] | None
) -> Iterator[tuple[int | None, str]]:
    """Yields what cannot be, with the request's index or None for the run.

    Args:
        completed: the lines of the requests that were not rejected.
        prompts: their ids, by index; None where they are not known.
    """
    alike = None if prompts is None else longest_alike(prompts)
    shares = [value is True for value in run.engine_settings(KEY)]  # of each segment
    for line in completed:
        value, index = line.get("shared_tokens"), line["index"]
        if value is None and not all(shares):
            continue
        if type(value) is not int or not 0 <= value < max(line["prompt_tokens"], 1):
            yield index, f"shared_tokens is {one_line(str(value), 40)} of a prompt of {line['prompt_tokens']} tokens"
        elif value and not any(shares):
            yield index, f"shared_tokens is {value}, but engine.{KEY} is not true"
        elif alike is not None and value > alike.get(index, value):
            yield index, f"shared_tokens is {value}, but other prompts begin with {alike[index]} of its ids at most"
    statistics = run.record.get("engine_statistics")
    # A resumed run's are those of its last segment, and the completions are all there.
    if run.ok and isinstance(statistics, dict) and not run.record.get("segments"):
        said, found = statistics.get(STATISTIC), sum(map(tokens_of, completed))
        if (said or 0) != found:
            yield None, f"record.json says {STATISTIC} {one_line(str(said), 40)}, the completions have {found}"


def longest_alike(prompts: dict[int, list[int]]) -> dict[int, int]:
    """Returns by index with how many of a prompt's ids, at most, another prompt begins too."""
    ordered = sorted(prompts, key=lambda index: prompts[index])
    found = dict.fromkeys(ordered, 0)
    for one, other in pairwise(ordered):  # in this order the likest stand side by side
        length = _alike(prompts[one], prompts[other])
        found[one], found[other] = max(found[one], length), max(found[other], length)
    return found


def _alike(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))
