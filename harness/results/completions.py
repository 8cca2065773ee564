"""``completions.jsonl``: reading it back after whatever happened, and counting what is in it."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError
from harness.basics.files import numbered_lines


def percentile(values: Sequence[float], q: float) -> float | None:
    """Returns the ``q``-th percentile (0..100) of ``values``, linearly interpolated; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def parsed(line: bytes) -> dict[str, Any] | None:
    """Returns the completion that a line of the file is; None where it is none, as a torn one."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("finish_reason"), str):
        return None
    counts = (value.get("prompt_tokens"), value.get("output_tokens"))
    return value if all(isinstance(count, int) for count in counts) else None


def read_completions(path: str | Path) -> list[dict[str, Any]]:
    """Returns the completions of a ``completions.jsonl``, in order of finishing, without a torn last line.

    Raises:
        UserError: the file cannot be read, or a line that is not the last is no completion.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "a run writes it when its first request finishes")
    found = []
    try:
        for number, line in numbered_lines(path):
            completion = parsed(line)
            if completion is not None:
                found.append(completion)
            elif line.endswith(b"\n"):
                raise UserError(f"{path}, line {number}", "is not a completion", "the file was edited or damaged")
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "check this path") from error
    return found


class Tally:
    """Counts over completions, and their times in seconds from the start of the clock; no text, no ids."""

    def __init__(self) -> None:
        self.completed = self.rejected = self.prompt_tokens = self.output_tokens = 0
        self.first_token_s, self.finished_s = array("d"), array("d")

    def add(self, completion: dict[str, Any]) -> None:
        """Counts one completion; a rejected request was never fed to the model and adds no tokens."""
        if completion["finish_reason"] == "rejected":
            self.rejected += 1
            return
        self.completed += 1
        self.prompt_tokens += completion["prompt_tokens"]
        self.output_tokens += completion["output_tokens"]
        for name, values in (("first_token_s", self.first_token_s), ("finished_s", self.finished_s)):
            if completion.get(name) is not None:
                values.append(completion[name])

    @classmethod
    def of_file(cls, path: Path) -> Tally:
        """Counts what is on disk; lines that are no completions are passed over."""
        tally = cls()
        for _, line in numbered_lines(path):
            completion = parsed(line)
            if completion is not None:
                tally.add(completion)
        return tally

    def figures(self, elapsed_s: float | None) -> dict[str, Any]:
        """Returns the counts and, once the clock has been stopped, rates and percentiles."""
        total_tokens = self.prompt_tokens + self.output_tokens
        figures: dict[str, Any] = {
            "completed": self.completed,
            "rejected": self.rejected,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "total_tokens": total_tokens,
        }
        # Of a run that was cut short only the early finishers are known: their percentiles would flatter it.
        if elapsed_s is not None and elapsed_s > 0:
            figures["requests_per_s"] = self.completed / elapsed_s
            figures["total_tokens_per_s"] = total_tokens / elapsed_s
            figures["output_tokens_per_s"] = self.output_tokens / elapsed_s
            for name, values in (("ttft", self.first_token_s), ("latency", self.finished_s)):
                figures[f"{name}_p50_s"] = percentile(values, 50)
                figures[f"{name}_p99_s"] = percentile(values, 99)
        return figures
