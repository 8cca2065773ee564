"""What was found: one line each, printed as it is found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from harness.basics.errors import UserError, one_line

CONFIG = "config"  # the area of what decides whether the given config can run
VERDICT = "verdict"


class Outcome(str, Enum):
    """``ok`` is there and works, ``no`` cannot be had here, ``note`` is worth knowing."""

    ok = "ok"
    no = "no"
    note = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        area: what it is about, in a word.
        text: what was found.
        remedy: what to do about it; empty where there is nothing to do.
    """

    area: str
    outcome: Outcome
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return one_line(f"[{self.outcome.value}] {self.area}: {self.text}{'; ' * bool(self.remedy)}{self.remedy}", 1000)

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return asdict(self) | {"outcome": self.outcome.value}


class OutputEnded(Exception):
    """Standard output takes no more; the cause is the system's."""


class Findings:
    """All findings, in the order in which they came.

    Args:
        aloud: whether each is printed at once.
    """

    def __init__(self, aloud: bool) -> None:
        self.all: list[Finding] = []
        self._aloud = aloud

    def add(self, area: str, outcome: Outcome, text: str, remedy: str = "") -> None:
        """Takes a finding, unless the same was said before."""
        finding = Finding(area, outcome, text, remedy)
        if finding in self.all:
            return
        self.all.append(finding)
        if self._aloud:
            show(str(finding))

    def ok(self, area: str, text: str) -> None:
        """Something is there and works."""
        self.add(area, Outcome.ok, text)

    def no(self, area: str, text: str, remedy: str = "") -> None:
        """Something cannot be had here."""
        self.add(area, Outcome.no, text, remedy)

    def note(self, area: str, text: str, remedy: str = "") -> None:
        """Something is worth knowing."""
        self.add(area, Outcome.note, text, remedy)

    def refused(self, area: str, error: UserError) -> None:
        """A check of the harness refuses something, in its own words."""
        self.no(area, f"{error.field}: {error.found}", error.remedy)

    @property
    def against(self) -> list[Finding]:
        """What keeps the given config from running."""
        return [one for one in self.all if one.area == CONFIG and one.outcome is Outcome.no]

    def conclude(self) -> int:
        """Says whether the given config can run here; returns the exit status."""
        if against := self.against:
            others = f", for {len(against)} reasons, the first" if len(against) > 1 else ""
            self.no(VERDICT, f"the config cannot run here{others}: {against[0].text}", against[0].remedy)
            return 1
        self.ok(VERDICT, "the config can run here")
        return 0


def show(text: str) -> None:
    """Prints at once; raises OutputEnded."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OutputEnded from error
