"""What was promised of the CUDA engine on one H100 with 7B shapes, beside what was measured.

The promises: ``fastgen`` at least 1.5 times stock MII and 15 times the committee's loop, 55% of the card's measured
bf16 matrix rate over the whole job, the device busy 95% of the time, the demo model's ids judged right, the same ids
twice. Each is met, not met, or not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from acceptance.findings import Figure, Finding, Outcome

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
OURS, MII, BASELINE, AGAIN = "7B fastgen triton", "7B mii", "7B baseline", "7B fastgen triton again"
SHARE, MOST = "share_of_measured_rate", "most_share_of_measured_rate"  # of the matrix rate; by the roofline's bound
CASES = (OURS, MII, BASELINE)  # whose rates count
SAME = "same_ids_share"  # the figure of the case that ran again
RATE = "total_tokens_per_s"


@dataclass(frozen=True)
class Goal:
    """One promise.

    Attributes:
        least: that ``value`` has to be.
        value: measured; None where it was not.
        on: what it was measured on, or why it was not.
    """

    name: str
    least: float
    value: float | None
    on: str

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.value is None:
            return NOT_MEASURED
        return MET if self.value >= self.least else NOT_MET

    @property
    def line(self) -> str:
        """It in one line."""
        if self.value is None:
            return f"{NOT_MEASURED}: {self.on}"
        return f"{self.verdict}: {self.value:.3g}, promised at least {self.least:g} ({self.on})"


def goals(found: Mapping[str, Finding], demo: list[Finding]) -> list[Goal]:
    """Returns all goals.

    Args:
        found: findings of the cases, by name.
        demo: another stage's findings of the demo model with the Triton kernels, judged by ``harness.verify``.
    """
    return [
        _ratio("fastgen against MII", 1.5, found, MII),
        _ratio("fastgen against the committee's loop", 15.0, found, BASELINE),
        _figure("share of the measured bf16 matrix rate", 0.55, found, OURS, SHARE),
        _figure("device busy", 0.95, found, OURS, "device_busy_share"),
        _demo(demo),
        _figure("same ids twice", 1.0, found, AGAIN, SAME),
    ]


def figures(goal: Goal) -> dict[str, Figure]:
    """Returns a goal as figures of a finding."""
    value = {} if goal.value is None else {"value": goal.value}
    return {**value, "at_least": goal.least, "verdict": goal.verdict}


def _missing(found: Mapping[str, Finding], case: str, key: str) -> str | None:
    """Returns why a case has no such figure; None where it has it."""
    finding = found.get(case)
    if finding is None:
        return f"{case} was not run"
    if finding.outcome is not Outcome.measured:
        return f"{case}: {finding.outcome.value}" + (f": {finding.detail}" if finding.detail else "")
    return None if key in finding.figures else f"{case} has no {key}"


def _ratio(name: str, least: float, found: Mapping[str, Finding], other: str) -> Goal:
    for case in (OURS, other):
        if missing := _missing(found, case, RATE):
            return Goal(name, least, None, missing)
    ours, theirs = found[OURS].figures, found[other].figures
    on = f"{ours[RATE]:,.0f} against {theirs[RATE]:,.0f} total tokens/s"
    counts = ours.get("requests"), theirs.get("requests")
    if counts[0] != counts[1]:
        on += f", of {counts[0]} against {counts[1]} requests"
    return Goal(name, least, ours[RATE] / theirs[RATE], on)


def _figure(name: str, least: float, found: Mapping[str, Finding], case: str, key: str) -> Goal:
    if missing := _missing(found, case, key):
        return Goal(name, least, None, missing)
    most = found[case].figures.get(MOST) if key == SHARE else None
    on = case if most is None else f"{case}; by the roofline these requests allow {float(most):.3g} on this card"
    return Goal(name, least, float(found[case].figures[key]), on)


def _demo(demo: list[Finding]) -> Goal:
    name = "demo model's ids judged right"
    judged = [one for one in demo if one.outcome in (Outcome.passed, Outcome.failed)]
    if not judged:
        return Goal(name, 1.0, None, "the stage engines has no run of the demo model with triton kernels")
    right = [one for one in judged if one.outcome is Outcome.passed]
    return Goal(name, 1.0, len(right) / len(judged), f"{len(right)} of {len(judged)} runs, by harness.verify")
