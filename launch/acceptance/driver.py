"""Runs the stages, each in a process of its own, in their order, and keeps what they found out.

One loop watches a stage and, beside it, those in the background: their ends, their limits, and whether the driver is to
end itself. A stage that needs one which still runs lets the following ones go first.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from acceptance import findings, here, kernels, records
from acceptance.child import KILL_S, SWEEP_S, Child, adopt_orphans, reap
from acceptance.findings import Outcome
from acceptance.records import FINAL, Record, Status
from acceptance.stages import Plan
from harness.basics.errors import UserError
from harness.basics.files import json_bytes
from harness.basics.files import replace as put

LOOK_S = 0.05
CLOSING_S = 20.0  # for the table and the archives
RESERVE_S = KILL_S + SWEEP_S + CLOSING_S
LEAST_S = 20.0  # a stage is not begun for less, unless that is its limit
WHOSE = "acceptance.json"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        only: stages to run, all if empty.
        again: stages to repeat though they are done.
        budget_s: seconds for everything, the table and the archives included.
    """

    out: Path
    rehearse: bool = False
    only: Sequence[str] = ()
    again: Sequence[str] = ()
    budget_s: float = math.inf

    def chosen(self, plans: Sequence[Plan]) -> list[str]:
        """Returns the stages that are to have passed at the end, with those that they need."""
        names = {*self.only, *self.again} if self.only else {plan.name for plan in plans}
        needed = {need for plan in plans if plan.name in names for need in plan.needs}
        return [plan.name for plan in plans if plan.name in names | needed]


class Driver:
    """One start of the acceptance.

    Args:
        plans: all stages, in their order.
        machine: what the folder's findings hold for.
    """

    def __init__(self, asked: Asked, plans: Sequence[Plan], machine: here.Here) -> None:
        self.asked = asked
        self.out = asked.out.resolve()
        self.plans = plans
        self.machine = machine
        self._deadline = time.monotonic() + asked.budget_s
        self._environment = here.environment(asked.rehearse, self.out / kernels.FOLDER)
        chosen = asked.chosen(plans)
        self._waiting = [plan for plan in plans if plan.name in chosen and self._begin(plan)]
        self._running: list[tuple[Plan, Child]] = []
        self._missing: dict[str, str] = {}
        self._ended = ""

    def run(self) -> list[Record]:
        """Runs what is to be run; returns how all stages went, those of earlier starts included, in their order."""
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._end)
        self._unlock()
        while self._waiting or self._running:
            reap([child.process.pid for _, child in self._running])
            for plan, child in list(self._running):
                if child.over():
                    self._running.remove((plan, child))
                    self._close(plan, child)
            self._start_next()
            time.sleep(LOOK_S if self._running else 0)
        return [record for plan in self.plans if (record := self._record(plan)) is not None]

    def _begin(self, plan: Plan) -> bool:
        """Returns whether a stage is to run, having forgotten what is to be repeated."""
        if plan.name in self.asked.again:
            records.forget(self.out, plan.name)
        known = records.read(self.out, plan.name)
        if known is not None and known.status in FINAL:
            say(f"{plan.name}: {known.status.value} before")
            return False
        return True

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ended = self._ended or f"the acceptance was ended by {signal.Signals(number).name}"

    def _start_next(self) -> None:
        """Starts the first stage that can be, unless one runs in the foreground; drops those that never will."""
        if self._ended:
            for _, child in self._running:
                child.end(Status.killed, self._ended)
            self._drop(self._waiting, self._ended)
        if any(not plan.background for plan, _ in self._running):
            return
        busy = {plan.name for plan, _ in self._running} | {plan.name for plan in self._waiting}
        for plan in list(self._waiting):
            if not busy.isdisjoint(plan.needs):
                continue
            if (reason := self._lacking(plan)) is not None:
                self._drop([plan], reason)
            elif (limit := self._limit(plan)) is None:
                self._drop([plan], "no time left")
            else:
                self._waiting.remove(plan)
                self._start(plan, limit)
            return

    def _lacking(self, plan: Plan) -> str | None:
        """Returns which stage that it needs did not come to its end."""
        for name in plan.needs:
            known = records.read(self.out, name)
            if known is None or known.status not in FINAL:
                return f"it needs {name}: {known.status.value if known else Status.missing.value}"
        return None

    def _limit(self, plan: Plan) -> float | None:
        """Returns a stage's limit, which the budget may shorten; None where it is too short to begin."""
        limit = min(plan.limit_s, self._deadline - RESERVE_S - time.monotonic())
        return limit if limit >= min(plan.limit_s, LEAST_S) else None

    def _drop(self, plans: Sequence[Plan], reason: str) -> None:
        for plan in list(plans):
            self._waiting.remove(plan)
            self._missing[plan.name] = reason
            say(f"{plan.name}: missing: {reason}")

    def _start(self, plan: Plan, limit: float) -> None:
        command = [sys.executable, "-m", "acceptance.stage", plan.name, "--out", str(self.out)]
        command += [
            "--module",
            plan.module,
            "--limit",
            f"{limit:.1f}",
            *(["--rehearse"] if self.asked.rehearse else []),
        ]
        self._running.append((plan, Child(plan.name, command, self._environment, self._log(plan), limit)))
        say(f"{plan.name}: started, limit {limit:.0f} s{', in the background' if plan.background else ''}")

    def _close(self, plan: Plan, child: Child) -> None:
        """Records how a stage went."""
        known = records.read(self.out, plan.name)
        found = findings.read(self.out / f"{plan.name}.jsonl")
        status, reason = child.status(any(one.outcome == Outcome.failed for one in found), bool(found))
        code = child.process.returncode
        record = Record(
            stage=plan.name, title=plan.title, status=status, reason=reason,
            exit=code if code >= 0 else None, signal=-code if code < 0 else None,
            seconds=round(child.seconds + (known.seconds if known else 0), 1), limit_s=plan.limit_s,
            started_at=child.started_at, commit=self.machine.commit, rehearse=self.asked.rehearse, findings=found,
        )  # fmt: skip
        record.write(self.out)
        if status not in FINAL:
            self._unlock()
        counts = ", ".join(f"{count} {outcome.value}" for outcome, count in record.counts().items())
        why = f" ({reason})" if reason else ""
        say(f"{plan.name}: {status.value}{why} after {child.seconds:.0f} s: {counts or 'no findings'}")
        for finding in record.of(Outcome.failed):
            say(f"  {finding.line()}")

    def _record(self, plan: Plan) -> Record | None:
        """Returns how a stage went at last; None for one that nobody asked for."""
        known, reason = records.read(self.out, plan.name), self._missing.get(plan.name)
        if reason is None:
            return known
        if known is not None and known.status is not Status.missing:  # interrupted before, and not reached now
            return replace(known, reason=f"{known.reason}; now: {reason}")
        record = Record(
            stage=plan.name, title=plan.title, status=Status.missing, reason=reason, limit_s=plan.limit_s,
            commit=self.machine.commit, rehearse=self.asked.rehearse, findings=[],
        )  # fmt: skip
        record.write(self.out)
        return record

    def _log(self, plan: Plan) -> Path:
        return self.out / f"{plan.name}.log"

    def _unlock(self) -> None:
        for name in kernels.clear_locks(self._environment):
            say(f"a lock that a build of {name} had left is gone")


def say(line: str) -> None:
    """Prints a line of progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def claim(asked: Asked, machine: here.Here) -> None:
    """Makes the folder this acceptance's.

    Raises:
        UserError: it holds findings of another card or of the other mode.
    """
    asked.out.mkdir(parents=True, exist_ok=True)
    mine = {"mode": "rehearsal" if asked.rehearse else "real", "card": machine.card}
    place = asked.out / WHOSE
    try:
        theirs = json.loads(place.read_text())
    except (OSError, ValueError):
        put(place, json_bytes(mine) + b"\n")
        return
    if theirs != mine:
        whose = f"it holds a {theirs.get('mode')} on {theirs.get('card')}, this is a {mine['mode']} on {mine['card']}"
        raise UserError("--out", f"{asked.out}: {whose}", "give another folder")
