"""What a run says of its drafts, against its config and its passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.basics.errors import one_line
from harness.results.passes import pass_rows
from harness.verify.runs import RecordedRun

DRAFTED, ACCEPTED = "draft_tokens", "accepted_draft_tokens"


def wasted(record: dict[str, Any]) -> int:
    """Returns how many tokens were fed that became no output; 0 where the record says nothing usable."""
    drafted, accepted = (_count(record.get(name)) or 0 for name in (DRAFTED, ACCEPTED))
    return max(drafted - accepted, 0)


def most_a_pass(run: RecordedRun) -> int:
    """Returns how many tokens a pass can give a request."""
    most = run.setting("engine", "draft_len")
    return 1 + most if run.setting("engine", "draft") is not None and type(most) is int and most > 0 else 1


def check(run: RecordedRun) -> Iterator[str]:
    """Yields what cannot be; how many drafts held follows from the tokens of the passes, with all else."""
    said = [run.record.get(name) for name in (DRAFTED, ACCEPTED)]
    if said == [None, None]:  # another engine's run, or an older version's
        return
    drafted, accepted = map(_count, said)
    if drafted is None or accepted is None or accepted > drafted:
        found = " of ".join(one_line(str(value), 40) for value in reversed(said))
        yield f"record.json says that {found} drafts became output"
    elif drafted and all(value is None for value in run.engine_settings("draft")):
        yield f"record.json says {DRAFTED} {drafted}, but engine.draft is not set"


def check_passes(run: RecordedRun, path: Path) -> Iterator[str]:
    """Yields whether the passes of one replica, never resumed, have other drafts than the record."""
    drafted = _count(run.record.get(DRAFTED))
    found = sum(int(count) for (count,) in pass_rows(path, DRAFTED))
    if drafted is not None and drafted != found:
        yield f"record.json says {DRAFTED} {drafted}, the passes of {path.name} have {found}"


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
