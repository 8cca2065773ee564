"""How a stage went: NAME.json, which decides at the next start whether it runs again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from acceptance import findings
from acceptance.findings import Finding, Outcome
from harness.basics.files import json_bytes, plain, replace


class Status(str, Enum):
    """How a stage ended."""

    passed = "passed"
    failed = "failed"  # ran to its end: a finding failed, or it raised
    timeout = "timeout"  # its limit came first; the next start goes on
    killed = "killed"  # died by a signal; the next start goes on
    missing = "missing"  # did not run


FINAL = (Status.passed, Status.failed)


@dataclass
class Record:
    """How a stage went.

    Attributes:
        exit: its exit status, None if it died by ``signal`` or did not run.
        reason: in one line, what the status does not say.
        seconds: of all attempts together.
        commit: of the code, a fingerprint of it where there is no git.
    """

    stage: str
    title: str
    status: Status
    reason: str = ""
    exit: int | None = None
    signal: int | None = None
    seconds: float = 0.0
    limit_s: float = 0.0
    started_at: str = ""
    commit: str = ""
    rehearse: bool = False
    findings: list[Finding] | None = None

    def counts(self) -> Counter[Outcome]:
        """Returns how many findings there are of each outcome."""
        return Counter(finding.outcome for finding in self.findings or [])

    def of(self, *outcomes: Outcome) -> list[Finding]:
        """Returns the findings of these outcomes."""
        return [finding for finding in self.findings or [] if finding.outcome in outcomes]

    def write(self, out: Path) -> None:
        """Puts it into the folder of the acceptance."""
        replace(out / f"{self.stage}.json", json_bytes(plain(asdict(self)), indent=1) + b"\n")


def read(out: Path, stage: str) -> Record | None:
    """Returns what an earlier start wrote of a stage, with the findings of its latest attempt; None if nothing."""
    try:
        values: dict[str, Any] = json.loads((out / f"{stage}.json").read_text(encoding="utf-8"))
        values |= {"status": Status(values["status"]), "findings": findings.read(out / f"{stage}.jsonl")}
        return Record(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget(out: Path, stage: str) -> None:
    """Takes away what earlier starts found out in a stage, and its own files; its log and its runs stay."""
    shutil.rmtree(out / stage, ignore_errors=True)
    for name in (f"{stage}.json", f"{stage}.jsonl"):
        (out / name).unlink(missing_ok=True)
