"""The table at the end: table.txt for people, table.json for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from acceptance.findings import Outcome
from acceptance.here import Here
from acceptance.records import Record
from harness.basics.files import json_bytes, plain, replace

ROW = "{:<15} {:<8} {:>7} {:>7} {:>7} {:>8} {:>8} {:>9}"


def lines(head: str, records: list[Record]) -> Iterator[str]:
    """Yields the table, what failed or was refused, and what was measured.

    Args:
        head: which card and which code.
        records: in the order of the stages.
    """
    yield head
    yield ROW.format("stage", "status", "seconds", *(outcome.value for outcome in Outcome)).rstrip()
    for record in records:
        counts = record.counts()
        row = ROW.format(record.stage, record.status.value, f"{record.seconds:.0f}", *(counts[one] for one in Outcome))
        yield row + (f"  {record.reason}" if record.reason else "")
    for title, outcomes in (
        ("failed or refused", (Outcome.failed, Outcome.refused)),
        ("measured", (Outcome.measured,)),
    ):
        found = [(record.stage, finding) for record in records for finding in record.of(*outcomes)]
        if found:
            yield ""
            yield f"{title}:"
            yield from (f"  {stage}: {finding.line()}" for stage, finding in found)
    others = [record for record in records if record.commit and record.commit not in head]
    if others:
        yield ""
        yield "of other code: " + ", ".join(f"{record.stage} (commit {record.commit})" for record in others)


def write(out: Path, here: Here, rehearse: bool, records: list[Record]) -> str:
    """Writes both files; returns the text."""
    head = f"{'rehearsal on ' if rehearse else ''}{here.line()}"
    text = "\n".join(lines(head, records)) + "\n"
    replace(out / "table.txt", text.encode())
    whole = {**asdict(here), "rehearse": rehearse, "stages": [asdict(record) for record in records]}
    replace(out / "table.json", json_bytes(plain(whole), indent=1) + b"\n")
    return text
