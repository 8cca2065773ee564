"""Runs that are to come out right: started, several at a time, judged by ``harness.verify`` and reported."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acceptance import tiny_models
from acceptance.commands import Steps, together
from acceptance.findings import Outcome
from acceptance.harness_run import HarnessRun, Verdict, harness_steps, verdict_steps
from acceptance.stage import Stage, last_line
from harness.machine import device

RUN_S, VERIFY_S = 120.0, 90.0  # of a small model on a GPU, and of a judge of its run


@dataclass(frozen=True)
class Case:
    """A run that is to come out right.

    Attributes:
        name: of the finding.
        gpus: that it takes.
        refusal: of what it may be refused, a regular expression; by default nothing.
        model: one of :data:`tiny_models.MODELS`; by default the demo model.
        repeated: whether it gives the same ids again when it is run once more.
    """

    name: str
    overrides: tuple[str, ...]
    gpus: int = 1
    refusal: str | None = None
    model: str | None = None
    repeated: bool = False


def possible(stage: Stage, cases: Sequence[Case]) -> list[Case]:
    """Returns the cases that are to be run now; reports those that this machine has too few GPUs for."""
    found = 1 if stage.rehearse else device.cuda_devices()
    left = [case for case in cases if not stage.done(case.name)]
    for case in left:
        if case.gpus > found:
            stage.report(case.name, Outcome.skipped, f"needs {case.gpus} GPUs, this machine shows {found}")
    return [case for case in left if case.gpus <= found]


def check_judged(stage: Stage, cases: Sequence[Case], models: Path) -> None:
    """Reports for each case whether ``harness.verify`` finds every token right, and the ids the same a second time."""
    needed = sorted({case.model for case in cases if case.model is not None})
    if needed:
        together([tiny_models.write_steps(stage, models, needed)], 1)
    together([reported(stage, case, judged_steps(stage, case, models)) for case in cases], at_once(stage))


def reported(stage: Stage, case: Case, steps: Steps[Verdict]) -> Steps[None]:
    """Reports a case's verdict as soon as it is there: what interrupts the stage costs only what still runs."""
    expected((yield from guarded(steps)), case.refusal).report(stage, case.name)


def guarded(steps: Steps[Verdict]) -> Steps[Verdict]:
    """Turns an error of one check into its verdict, so that the others go on."""
    try:
        return (yield from steps)
    except Exception as error:
        traceback.print_exc()
        return Verdict(Outcome.failed, last_line(error), {})


def at_once(stage: Stage) -> int:
    """Returns how many commands go on at a time: tiny models leave most of a GPU, and of a CPU, to others."""
    return 2 if stage.rehearse else min(6, max(2, (os.cpu_count() or 2) // 2))


def requests(stage: Stage) -> tuple[int, int]:
    """Returns how many prompts of the sample each engine is given, and the most tokens that it generates for one."""
    return (4, 8) if stage.rehearse else (16, 256)


def expected(verdict: Verdict, refusal: str | None) -> Verdict:
    """Returns a verdict, failed if it was refused for another reason than ``refusal``, a regular expression."""
    if verdict.outcome is Outcome.refused and not (refusal and re.search(refusal, verdict.detail)):
        return replace(verdict, outcome=Outcome.failed, detail=f"refused: {verdict.detail}")
    return verdict


def settings(stage: Stage) -> list[str]:
    """Returns what all runs have in common."""
    count, most = requests(stage)
    return [f"dataset.num_samples={count}", f"generation.max_output_len={most}"]


def run_steps(stage: Stage, case: Case, models: Path | None = None, again: bool = False) -> Steps[HarnessRun]:
    """Runs a case.

    Args:
        models: where the tiny models are.
        again: whether it is a second run of it, with a log of its own.
    """
    words = [*case.overrides, *settings(stage)]
    if "engine=fastgen" in words:  # several share a device, so that none may take most of its memory
        small = ["engine.kv_memory=256MiB", "engine.token_budget=64", "engine.max_sequences=4"]
        words += small if stage.rehearse else ["engine.kv_memory=2GiB"]
    if case.model is not None and models is not None:
        words.append(f"model.path={tiny_models.directory(models, case.model)}")
    name = f"{case.name} again" if again else case.name
    return harness_steps(stage, name, *words, timeout_s=within(stage, RUN_S), env=one_thread(stage))


def within(stage: Stage, seconds: float) -> float:
    """Returns the limit of a run on a GPU; a CPU may take as long as its stage has."""
    return stage.limit_s if stage.rehearse else seconds


def one_thread(stage: Stage) -> dict[str, str]:
    """Returns the variables of a run of which another goes on beside it on a small CPU."""
    return {"OMP_NUM_THREADS": "1"} if stage.rehearse else {}


def on_device(stage: Stage, run: HarnessRun, verdict: Verdict) -> Verdict:
    """Returns the verdict, failed if the run was elsewhere or did not count its memory."""
    if not run.ok or verdict.outcome is not Outcome.passed or run.row is None:
        return verdict
    if run.row["device"] != stage.device:
        return replace(verdict, outcome=Outcome.failed, detail=f"it ran on {run.row['device']}")
    if not run.figure("peak_memory_bytes"):
        return replace(verdict, outcome=Outcome.failed, detail="peak_memory_bytes is empty")
    return verdict


def judged_steps(stage: Stage, case: Case, models: Path) -> Steps[Verdict]:
    """Runs a case, and has ``harness.verify`` judge it."""
    run = yield from run_steps(stage, case, models)
    verdict = yield from verdict_steps(stage, case.name, run, timeout_s=within(stage, VERIFY_S))
    verdict = on_device(stage, run, verdict)
    if not case.repeated or verdict.outcome is not Outcome.passed:
        return verdict
    again = yield from run_steps(stage, case, models, again=True)
    if again.token_ids != run.token_ids:
        differ = sum(again.token_ids.get(index) != ids for index, ids in run.token_ids.items())
        how = f"a second run gave other ids in {differ} of {len(run.token_ids)} requests" if again.ok else again.how
        return replace(verdict, outcome=Outcome.failed, detail=f"{how}; the first: {verdict.detail}")
    return replace(verdict, detail=f"{verdict.detail}; a second run gave the same ids")
