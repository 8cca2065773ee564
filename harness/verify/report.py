"""What ``verify`` found: the verdict, and how it is shown."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.basics.errors import one_line
from harness.basics.terminal import PLAIN_WIDTH, without_trailing_blanks
from harness.models.judging import Judgement, finite
from harness.verify.pairs import Divergence, Pair
from harness.verify.recount import Recount
from harness.verify.runs import RecordedRun

NOT_PROVEN = "not proven by these files: that the clock ran as recorded, and on which machine"


@dataclass(slots=True)
class Verification:
    """Everything that was found out.

    Attributes:
        recounts: one a run.
        bound: largest gap of a near-tie; None without a model.
        reference: what judged, for the user; None without a model.
        pair: the comparison of two runs.
        gaps: of both runs' tokens where they part, by request; standard deviations below the best.
        largest: the largest gap of all tokens of such a request, in either run.
        judgements: of one run's completions.
        token_text: the text of a token, where there is a tokenizer.
    """

    recounts: list[Recount]
    runs: list[RecordedRun]
    bound: float | None = None
    reference: str | None = None
    pair: Pair | None = None
    gaps: dict[int, tuple[float, float]] = field(default_factory=dict)
    largest: dict[int, float] = field(default_factory=dict)
    judgements: list[Judgement] = field(default_factory=list)
    token_text: Callable[[int], str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int | None:
        """Requests whose tokens were compared, with another run or with the model; None if none were."""
        if self.pair is not None:
            return self.pair.compared
        return len(self.judgements) or None

    @property
    def exact(self) -> int:
        """Of those, the ones with no difference."""
        if self.pair is not None:
            return self.pair.exact
        return sum(judgement.first is None for judgement in self.judgements)

    @property
    def explained(self) -> list[int]:
        """Requests whose tokens differ by near-ties only."""
        if self.pair is not None:
            return [one.index for one in self.pair.differences if self._near_tie(one)]
        return [one.index for one in self.judgements if one.first is not None and one.wrong is None]

    @property
    def wrong(self) -> list[int]:
        """Requests that are known to be wrong: another prompt or end, or a token that rounding cannot give."""
        if self.pair is not None:
            judged = self.reference is not None
            return [
                one.index
                for one in self.pair.differences
                if one.reason is not None or (judged and not self._near_tie(one))
            ]
        return [one.index for one in self.judgements if one.wrong is not None]

    @property
    def unexplained(self) -> list[int]:
        """Requests that differ, and that no model was asked about."""
        if self.pair is None or self.reference is not None:
            return []
        return [one.index for one in self.pair.differences if one.reason is None]

    def _near_tie(self, difference: Divergence) -> bool:
        return self.bound is not None and self.largest.get(difference.index, math.inf) <= self.bound

    @property
    def findings(self) -> list[str]:
        """What does not add up, run by run."""
        name = len(self.recounts) > 1
        return [(f"{one.run_id}: " if name else "") + str(found) for one in self.recounts for found in one.findings]

    @property
    def incomplete(self) -> list[str]:
        """The runs that are not ok, and what there is of them."""
        return [
            f"{run.run_id} is {one_line(str(run.record['status']), 20)}: {of.requests:,} of "
            f"{one_line(str(run.record.get('requests')), 20)} requests"
            for run, of in zip(self.runs, self.recounts, strict=True)
            if not run.ok
        ]

    @property
    def right(self) -> bool:
        """Whether the runs are complete, nothing is wrong and nothing is left unexplained."""
        return not (self.findings or self.wrong or self.unexplained or self.incomplete)

    @property
    def verdict(self) -> str:
        """The verdict, one line."""
        parts = []
        if self.compared is not None:
            parts.append(f"{self.exact} of {_requests(self.compared)} exact")
        if explained := self.explained:
            largest = max(self._largest(index) for index in explained)
            parts.append(f"{len(explained)} explained by near-ties (gaps up to {largest:.2g}, bound {self.bound:g})")
        if wrong := self.wrong:
            parts.append(f"{len(wrong)} wrong, the first is request {wrong[0]} ({self._why(wrong[0])})")
        if unexplained := self.unexplained:
            parts.append(f"{len(unexplained)} with other tokens: --model says whether they are near-ties")
        if findings := self.findings:
            more = f" ({len(findings)} such findings)" if len(findings) > 1 else ""
            parts.append(f"it does not add up: {findings[0]}{more}")
        elif self.compared is None:
            counts = self.recounts[0].counts
            parts.append(
                f"{_requests(counts['completed'])} completed with {counts['prompt_tokens']:,} prompt + "
                f"{counts['output_tokens']:,} output tokens, as recorded; the tokens themselves were not compared"
            )
        if self.pair is not None and any(self.pair.alone):
            rejected = f", {self.pair.mixed_rejections} of them rejected by the other" * bool(
                self.pair.mixed_rejections
            )
            parts.append(f"{_requests(sum(map(len, self.pair.alone)))} in one run only{rejected}")
        parts += self.incomplete
        word = "wrong" if self.findings or self.wrong else "not explained" if self.unexplained else "incomplete"
        word = "right" if self.right else word
        return one_line(f"{word}: {'; '.join(parts)}", 1000)

    def _largest(self, index: int) -> float:
        if index in self.largest:
            return self.largest[index]
        return next((one.largest for one in self.judgements if one.index == index), 0.0)

    def _why(self, index: int) -> str:
        if self.pair is not None:
            difference = next(one for one in self.pair.differences if one.index == index)
            if difference.reason is not None:
                return difference.reason
            gaps = self.gaps.get(index)
            if gaps is None:
                return "not among the dataset's requests"
            if self.bound is not None and max(gaps) <= self.bound:
                after = f"after a near-tie at token {difference.position}, a token is"
                return f"{after} {_gap(self.largest[index])} below the best, bound {self.bound:g}"
            return f"token {difference.position}: {_gap(max(gaps))} below the best, bound {self.bound:g}"
        judgement = next(one for one in self.judgements if one.index == index)
        assert judgement.wrong is not None
        gap = _gap(judgement.scores.gaps[judgement.wrong])
        return f"token {judgement.wrong}: {gap} below the best, bound {self.bound:g}"

    def positions(self) -> list[int]:
        """Returns where requests first differ, in ascending order."""
        if self.pair is not None:
            return sorted(one.position for one in self.pair.differences if one.position is not None)
        return sorted(one.first for one in self.judgements if one.first is not None)

    def differences(self) -> list[dict[str, Any]]:
        """Returns one plain entry for each request that differs, the worst first."""
        entries: list[tuple[tuple[int, float], dict[str, Any]]] = []
        wrong = set(self.wrong)
        for difference in self.pair.differences if self.pair is not None else ():
            gaps = self.gaps.get(difference.index)
            verdict = "wrong" if difference.index in wrong else "near_tie" if gaps is not None else "unexplained"
            entry: dict[str, Any] = {
                "index": difference.index,
                "position": difference.position,
                "token_ids": list(difference.ids),
                "tokens": [self._text(token) for token in difference.ids],
                "gaps": None if gaps is None else [finite(gap) for gap in gaps],
                "verdict": verdict,
                "reason": difference.reason,
            }
            entries.append(((difference.reason is None, -max(gaps or (0.0, 0.0))), entry))
        for judgement in self.judgements:
            if judgement.worst is None:
                continue
            place = judgement.worst
            ids = self._ids(judgement.index)
            pair = (ids[place], judgement.scores.best[place])
            entry = {
                "index": judgement.index,
                "position": place,
                "token_ids": list(pair),
                "tokens": [self._text(token) for token in pair],
                "gaps": [finite(judgement.largest), 0.0],
                "verdict": "wrong" if judgement.wrong is not None else "near_tie",
                "reason": None,
                "first_position": judgement.first,
                "tokens_not_best": sum(not gap <= 0 for gap in judgement.scores.gaps),
                "gap_in_logits": finite(judgement.largest * judgement.scores.spread[place]),
            }
            entries.append(((1, -judgement.largest), entry))
        return [entry for _, entry in sorted(entries, key=lambda item: item[0])]

    def _ids(self, index: int) -> list[int]:
        ids: list[int] = next(line["token_ids"] for line in self.runs[0].completions if line["index"] == index)
        return ids

    def _text(self, token: int | None) -> str | None:
        return None if token is None or self.token_text is None else self.token_text(token)

    def as_json(self) -> str:
        """Returns everything as JSON; ASCII, so that no text reaches a terminal as it is."""
        pair = self.pair
        tokens = [gap for judgement in self.judgements for gap in judgement.scores.gaps]
        data = {
            "verdict": self.verdict,
            "right": self.right,
            "runs": [
                {
                    "run_id": one.run_id,
                    "status": one.status,
                    **one.counts,
                    "findings": [{"index": found.index, "found": found.text} for found in one.findings],
                }
                for one in self.recounts
            ],
            "compared": self.compared,
            "exact": self.exact if self.compared is not None else None,
            "exact_share": self.exact / self.compared if self.compared else None,
            "explained": self.explained,
            "wrong": self.wrong,
            "unexplained": self.unexplained,
            "first_divergences": self.positions(),
            "only_in_one_run": None if pair is None else [list(indices) for indices in pair.alone],
            "reference": self.reference,
            "bound": self.bound,
            "tokens_judged": len(tokens) or None,
            "tokens_that_are_the_best": sum(gap <= 0 for gap in tokens) if tokens else None,
            "differences": self.differences(),
            "notes": self._all_notes(),
        }
        return json.dumps(data, indent=2) + "\n"

    def _all_notes(self) -> list[str]:
        notes = [*self.notes, *(note for one in self.recounts for note in one.notes), NOT_PROVEN]
        return list(dict.fromkeys(notes))  # of two runs, what goes for both is said once


def show(outcome: Verification, limit: int) -> str:
    """Returns what a person sees: the verdict, one line a run, the counts, and the worst ``limit`` differences."""
    terminal = sys.stdout.isatty()
    screen = Console(
        file=io.StringIO(), force_terminal=terminal, width=None if terminal else PLAIN_WIDTH, highlight=False
    )
    screen.print(Text(outcome.verdict, style="bold green" if outcome.right else "bold red"), soft_wrap=True)
    screen.print()
    screen.print(_summary(outcome))
    differences = outcome.differences()[:limit]
    if differences:
        screen.print()
        screen.print(_worst(outcome, differences))
        if (more := len(outcome.differences()) - len(differences)) > 0:
            screen.print(Text(f"and {more} more (--limit, --json)"))
    findings = outcome.findings
    lines = [*findings[:limit], *([f"and {len(findings) - limit} more (--limit, --json)"] if findings[limit:] else [])]
    for label, texts in (("Does not add up:", lines), ("Note:", outcome._all_notes())):
        for text in texts:
            screen.print(Text(f"{label} {one_line(text, 300)}"), soft_wrap=True)
    assert isinstance(screen.file, io.StringIO)
    return without_trailing_blanks(screen.file.getvalue())


def _summary(outcome: Verification) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    cells: list[tuple[str, str]] = [("run", "\n".join(one.run_id for one in outcome.recounts))]
    for name in ("completed", "rejected", "prompt_tokens", "output_tokens"):
        cells.append((name.replace("_", "\n"), "\n".join(f"{one.counts[name]:,}" for one in outcome.recounts)))
    if outcome.compared is not None:
        cells += [
            ("compared", f"{outcome.compared:,}"),
            ("exact", f"{outcome.exact:,}\n({outcome.exact / outcome.compared:.1%})"),
            ("explained", "?" if outcome.reference is None and outcome.unexplained else f"{len(outcome.explained):,}"),
            ("wrong", f"{len(outcome.wrong):,}"),
        ]
        if places := outcome.positions():
            cells.append(("first\ndivergences", f"{places[0]} to {places[-1]}\nmedian {median(places):g}"))
    for name, _ in cells:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    table.add_row(*(Text(text) for _, text in cells))
    return table


def _worst(outcome: Verification, differences: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    other = "other run's" if outcome.pair is not None else "reference's"
    headings = ["request", "token", "run's", other]
    if outcome.reference is not None:
        headings.append("gap" if outcome.pair is None else "gaps")
    for name in (*headings, ""):
        table.add_column(name, justify="right" if name in ("request", "token", "gap") else "left", overflow="fold")
    for one in differences:
        tokens = [_token(*both) for both in zip(one["token_ids"], one["tokens"], strict=True)]
        cells = [str(one["index"]), "" if one["position"] is None else str(one["position"]), *tokens]
        if outcome.reference is not None:
            gaps = [] if one["gaps"] is None else one["gaps"][: 2 if outcome.pair is not None else 1]
            cells.append(", ".join("none" if gap is None else _gap(gap) for gap in gaps))
        table.add_row(*map(Text, cells), Text(one["reason"] or one["verdict"].replace("_", "-")))
    return table


def _token(token: int | None, text: str | None) -> str:
    if token is None:
        return "(ended)"
    return str(token) if text is None else f"{token} {one_line(repr(text), 40)}"


def _requests(count: int) -> str:
    return f"{count:,} request{'s' if count != 1 else ''}"


def _gap(gap: float) -> str:
    return f"{gap:.2g}" if gap < 100 else f"{gap:.0f}"
