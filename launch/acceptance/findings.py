"""What a stage finds out: one JSON line each, on disk at once, so that a stage which dies keeps what it had."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from harness.basics.errors import one_line
from harness.basics.files import json_bytes, mend_last_line, plain, write_all

Figure = float | int | str


class Outcome(str, Enum):
    """How a check ended."""

    passed = "passed"
    failed = "failed"
    refused = "refused"  # the program said in one line why it cannot, and that is a proper refusal
    skipped = "skipped"  # does not apply to this machine; the detail says why
    measured = "measured"  # figures without a verdict


@dataclass(frozen=True)
class Finding:
    """One thing that a stage found out.

    Attributes:
        name: unique within the stage; a later finding of the same name takes the place of the earlier one.
        detail: one line: why it failed or was refused or skipped, what was compared.
        figures: by name with its unit (``copy_bytes_per_s``).
        seconds: what it took.
    """

    name: str
    outcome: Outcome
    detail: str
    figures: dict[str, Any]
    seconds: float

    def line(self) -> str:
        """Returns it as one line for people."""
        text = f"{self.name}: {self.outcome.value}" + (f": {self.detail}" if self.detail else "")
        return one_line(f"{text} {shown(self.figures)}".rstrip())


def shown(figures: dict[str, Any]) -> str:
    """Returns figures as ``name=value`` with four significant digits."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    return " ".join(f"{name}={value}" for name, value in values.items())


def append(path: Path, finding: Finding) -> None:
    """Adds a finding to a stage's file; it survives the end of the process and of the machine."""
    _add(path, asdict(finding))


def note(path: Path, what: str, name: str) -> None:
    """Notes in a stage's file that a check has ``begun``, or was ``left`` before its end since the stage was to end."""
    _add(path, {what: name})


def deaths(path: Path) -> Counter[str]:
    """Returns how often the process died inside which check: it was begun, and neither recorded nor left."""
    open_: Counter[str] = Counter()
    for values in _lines(path):
        if "begun" in values:
            open_[values["begun"]] += 1
        elif "left" in values:
            open_[values["left"]] -= 1
        else:
            open_.pop(values.get("name", ""), None)
    return open_


def _add(path: Path, values: dict[str, Any]) -> None:
    mend_last_line(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        write_all(descriptor, json_bytes(plain(values)) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Finding]:
    """Returns a stage's findings, the last of each name, in the order of their first; none without the file."""
    found: dict[str, Finding] = {}
    for values in _lines(path):
        try:
            finding = Finding(**values | {"outcome": Outcome(values["outcome"])})
        except (ValueError, TypeError, KeyError):
            continue  # a note
        found[finding.name] = finding
    return list(found.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off as its process died
        if isinstance(values, dict):
            yield values
