"""The cases one after the other: how many requests each gets, its run, its finding, what is left for another time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from acceptance import commands
from acceptance.cases import expected
from acceptance.commands import Ended, Running, Steps
from acceptance.findings import Figure, Finding, Outcome
from acceptance.harness_run import HarnessRun, Verdict, harness_steps
from acceptance.matrix import figures, forecast, goals
from acceptance.matrix.cases import Case
from acceptance.matrix.forecast import Choice
from acceptance.matrix.models import DTYPE, Model, Models
from acceptance.matrix.requests import Requests
from acceptance.stage import Stage
from harness.basics.errors import UserError
from harness.config.schema import HardwareConfig
from harness.costs import hardware as machines
from harness.costs.shape import ModelShape
from harness.engines.shared import deepspeed_ops
from harness.results.completions import read_completions

# Seconds of a run beside its clock, until one was seen: writing its checkpoint, starting, loading, the proof before
# the clock, compiling.
BESIDE_S = {"7B": 75.0, "13B": 110.0, "70B": 80.0}
BESIDE_REHEARSED_S, REHEARSED_S = 12.0, 300.0
EXPLAIN_S = 150.0


class Course:
    """What the stage does with its time.

    Attributes:
        left_over: what there was no time for.
    """

    def __init__(self, stage: Stage, models: Models, requests: Requests) -> None:
        self.stage, self.models, self.requests = stage, models, requests
        self.left_over: list[str] = []
        self._beside_s = dict.fromkeys(BESIDE_S, BESIDE_REHEARSED_S) if stage.rehearse else dict(BESIDE_S)
        self._explaining: dict[str, Running] = {}
        self._any = False  # whether this attempt has run anything

    @property
    def hardware(self) -> HardwareConfig | None:
        """The device's figures; None where nobody knows them. A CPU's are known once a run has measured them."""
        stage = self.stage
        if stage.rehearse:
            try:
                return machines.complete(HardwareConfig(name="cpu"), DTYPE)
            except UserError:
                return None
        memory, rate, copies = (self._machine(key) for key in ("memory_bytes", "bf16_flops", "copy_bytes_per_s"))
        name = stage.figure("machine", "name")
        return figures.of_device(str(name or ""), None if memory is None else int(memory), rate, copies)

    @cached_property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return int(self.models.dummy("7B").architecture["max_position_embeddings"])

    def _machine(self, key: str) -> float | None:
        found = self.stage.figure("machine", key)
        return float(found) if isinstance(found, int | float) else None

    def close(self) -> None:
        """Ends what still runs."""
        commands.end(list(self._explaining.values()))

    @property
    def at_once(self) -> int:
        """How many runs go on at a time: one where it is measured."""
        return 2 if self.stage.rehearse else 1

    def steps(self, case: Case) -> Steps[None]:
        """Runs a case, unless it was run before, or there is no time for it, or it is pointless."""
        stage = self.stage
        if not stage.done(case.name):
            yield from self._take(case)
        if case.like is None and "fastgen" in case.name:
            self._explain(case.name)

    def _take(self, case: Case) -> Steps[None]:
        stage = self.stage
        why = self._pointless(case)
        if why is not None:
            stage.report(case.name, Outcome.skipped, why)
            return
        settings: tuple[str, ...] = ()
        if case.tuned:
            settings = self._promising(str(case.like))
            if not settings:
                why = (self.explained(str(case.like)) or {}).get("error", "its simulation promises more of no setting")
                stage.report(case.name, Outcome.skipped, f"{case.like}: {why}")
                return
        choice = self.choice(case, self.models.dummy(case.size))
        if choice is not None:
            model = self.models.get(case.size)  # only now: to write it takes its time
            run, choice = yield from self._run(case, model, settings, choice)
            self._report(case, model, settings, choice, run)

    def _pointless(self, case: Case) -> str | None:
        """Returns why a case is not run at all; None where it is."""
        if case.like is not None:
            first = self.stage.finding(case.like)
            if first is None or first.outcome is not Outcome.measured:
                return f"{case.like} has no figures to go on from"
        if self.stage.rehearse or not (missing := [name for name in case.needs if not deepspeed_ops.built(name)]):
            return None
        refused = {one.name for one in self.stage.other("builds") if one.outcome is Outcome.refused}
        if refused.intersection(missing):
            return None  # they cannot be had here, and the engine says so itself
        return f"not built: {', '.join(missing)}; once they are, --again matrix"

    def choice(self, case: Case, model: Model) -> Choice | None:
        """Returns how many requests a case gets; None where it has to wait for another time, or is hopeless."""
        stage = self.stage
        if case.like is not None:
            first = stage.finding(case.like)
            assert first is not None
            took = float(first.figures["elapsed_s"])
            found: Choice | None = Choice(int(first.figures["requests"]), took)
        else:
            most = min(case.requests, self.requests.available)
            found = forecast.choose(most, case.clock_s, self._predict(case, model))
        beside = self._beside_s[case.size]
        if found is not None and beside + (found.predicted_s or 0.0) <= stage.left_s():
            return found
        if self._any or (found is not None and beside > stage.left_s()):
            self.left_over.append(case.name)
            return None
        # With all of a stage's time at hand it does not fit: it never will, unless it is made smaller.
        if case.like is None:
            found = forecast.choose(most, stage.left_s() - beside, self._predict(case, model))
        if found is None:
            stage.report(case.name, Outcome.skipped, f"even {forecast.LEAST} requests are predicted to take too long")
        return found

    def _predict(self, case: Case, model: Model) -> Any:
        hardware = self.hardware
        if hardware is None:
            return None
        shape = ModelShape.of(model.architecture, DTYPE)

        def predict(count: int) -> float:
            return forecast.seconds(case.kind, self.requests.lengths(count, self.context), shape, hardware, DTYPE)

        return predict

    def _run(
        self, case: Case, model: Model, settings: tuple[str, ...], choice: Choice
    ) -> Steps[tuple[HarnessRun, Choice]]:
        """Returns a run, or its second attempt with as many requests as its first one's rate allows."""
        words = (*case.words(self.stage.rehearse), *settings)
        run = yield from self.measured(case.name, case.size, model, words, choice)
        completed = int(run.figure("completed") or 0)
        again = forecast.fewer(choice.requests, completed, run.figure("elapsed_s") or 0.0, case.clock_s)
        if run.timed_out and again is not None:
            choice = Choice(again, case.clock_s)
            name = f"{case.name}, {again} requests"
            run = yield from self.measured(name, case.size, model, words, choice)
        return run, choice

    def measured(self, name: str, size: str, model: Model, words: Sequence[str], choice: Choice) -> Steps[HarnessRun]:
        """Returns a run of a model on the first requests, at its end or at twice the time that it should take."""
        self._any = True
        beside = self._beside_s[size]
        # In a rehearsal the machine may be anyone's, and a few requests tell nothing: what hangs is the stage's to end.
        timeout_s = REHEARSED_S if self.stage.rehearse else 2 * beside + 2 * (choice.predicted_s or 60.0) + 20.0
        asked = (*self.job(model, choice.requests), *words)
        run = yield from harness_steps(self.stage, name, *asked, timeout_s=timeout_s)
        if run.ok:
            self._beside_s[size] = max(run.seconds - (run.figure("elapsed_s") or 0.0), 5.0)
        return run

    def not_run(self, case: Case, ended: Ended, detail: str, **figures: Figure) -> None:
        """Reports a case without figures: refused of what it may be, or failed."""
        verdict = Verdict(Outcome.refused if ended.refused else Outcome.failed, detail, figures)
        expected(verdict, case.refusal(self.stage.rehearse)).report(self.stage, case.name)

    def job(self, model: Model, count: int) -> tuple[str, ...]:
        """Returns what all runs of a model on the first ``count`` requests have in common."""
        return (*model.overrides, *self.requests.overrides(count), "generation.stop=length", "parallel=single")

    def figures_of(self, run: HarnessRun, model: Model) -> dict[str, Figure]:
        """Returns the figures of a run that has ended well."""
        return figures.of_run(run, model.architecture, self.hardware, self._machine("bf16_flops"))

    def _report(self, case: Case, model: Model, settings: tuple[str, ...], choice: Choice, run: HarnessRun) -> None:
        notes = [f"stand-in: {' '.join(case.stand_in)}"] if self.stage.rehearse and case.stand_in else []
        notes += [f"with {' '.join(settings)}"] if settings else []
        if not run.ok:
            self.not_run(case, run, "; ".join([run.how, *notes]), requests=choice.requests)
            return
        found = self.figures_of(run, model)
        if choice.predicted_s is not None:
            found["predicted_s"] = round(choice.predicted_s, 2)
        if choice.requests < case.requests and not self.stage.rehearse:
            notes.append(f"{choice.requests} of {case.requests} requests, by the predicted time")
        if case.like is not None:
            first = self.stage.finding(case.like)
            assert first is not None
            if case.tuned:
                found["ratio_to_default"] = float(found[goals.RATE]) / float(first.figures[goals.RATE])
            else:
                found[goals.SAME] = self._same(run, first)
        self.stage.report(case.name, Outcome.measured, "; ".join(notes), **found)

    def _same(self, run: HarnessRun, first: Finding) -> float:
        """Returns the share of requests that got the same ids both times."""
        path = self.stage.results / str(first.figures["run_id"]) / "completions.jsonl"
        before = {line["index"]: line["token_ids"] for line in read_completions(path)}
        return sum(ids == before.get(index) for index, ids in run.token_ids.items()) / max(len(before), 1)

    def _explain(self, name: str) -> None:
        """Has the time of a run explained, beside what follows: one core's work, where a GPU has many at its side."""
        found = self.stage.finding(name)
        if found is None or found.outcome is not Outcome.measured or name in self._explaining:
            return
        if self.explained(name, wait=False) is not None:
            return
        words = ["-m", "harness.plan", "--explain", str(self.stage.results / str(found.figures["run_id"])), "--json"]
        self._explaining[name] = commands.started(self.stage, f"explain {name}", words, EXPLAIN_S)

    def explained(self, name: str, wait: bool = True) -> dict[str, Any] | None:
        """Returns where the time of a run went, as ``harness.plan --explain`` has it; None where it cannot tell."""
        path = self.stage.folder / f"explained {name}.json"
        if wait and name in self._explaining:
            ended = self._explaining.pop(name).wait()
            path.write_text(ended.stdout if ended.status == 0 else json.dumps({"error": ended.how}))
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _promising(self, name: str) -> tuple[str, ...]:
        """Returns the settings that promise most for a run, one value a key."""
        found = self.explained(name) or {}
        chosen: dict[str, str] = {}
        for change in found.get("changes", []):  # the best first
            key, _, value = str(change["setting"]).partition("=")
            if value:  # a KV cache of given bytes is only said to be doubled
                chosen.setdefault(key, value)
        return tuple(f"{key}={value}" for key, value in chosen.items())
