"""Stage matrix: the engines at 7B and 13B width and on the layers of 70B that fit, and what a pass consists of.

The order is that of value (:mod:`acceptance.matrix.cases`). Where the time is over before it is through, the stage ends
as one that is to go on: the next start does the rest.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from itertools import groupby

from acceptance.commands import Steps, together
from acceptance.findings import Finding, Outcome
from acceptance.matrix import goals, requests, tokenizers
from acceptance.matrix.cases import FIRST, REST, cases
from acceptance.matrix.course import Course
from acceptance.matrix.models import Models
from acceptance.matrix.parts import PROFILE, SEVENTY, explain_all, profile, recount, seventy
from acceptance.stage import Stage, last_line

REHEARSED, CAP = 6, 8  # requests, and output tokens of each


def run(stage: Stage) -> None:
    """Runs the stage; raises SystemExit where there was too little time for all of it."""
    tokenizer = stage.folder / "tokenizer"
    which = tokenizers.make(tokenizer, Models.vocabulary(stage))
    wanted = REHEARSED if stage.rehearse else max(case.requests for case in cases())
    found = requests.find(stage.folder, tokenizer, wanted, CAP if stage.rehearse else None)
    stage.report("requests", Outcome.measured, f"{found.said}; {which}", requests=min(wanted, found.available))
    models = Models(stage, tokenizer)
    course = Course(stage, models, found)
    try:
        for jobs in in_order(course):
            together(jobs, course.at_once)
        explain_all(course)
    finally:
        promised(stage)
        course.close()
    if course.left_over:
        print(f"too little time for: {', '.join(course.left_over)}", flush=True)
        sys.exit(os.EX_TEMPFAIL)
    models.remove()


def in_order(course: Course) -> Iterator[list[Steps[None]]]:
    """Yields what is to be run, group by group; what a group goes on from is in one before it."""
    chosen = [case for case in cases() if case.rehearsed or not course.stage.rehearse]
    first, rest = ([case for case in chosen if case.part == part] for part in (FIRST, REST))
    for _, group in groupby(first, lambda case: case.like is None):
        yield [guarded(course.stage, case.name, course.steps(case)) for case in group]
    beside = [guarded(course.stage, SEVENTY, seventy(course)), guarded(course.stage, PROFILE, profile(course))]
    counted = [case for case in chosen if case.name in (goals.CASES[:1] if course.stage.rehearse else goals.CASES)]
    yield [*beside, *(guarded(course.stage, f"{case.name} recounted", recount(course, case)) for case in counted)]
    for _, group in groupby(rest, lambda case: case.like is None):
        yield [guarded(course.stage, case.name, course.steps(case)) for case in group]


def guarded(stage: Stage, name: str, steps: Steps[None]) -> Steps[None]:
    """Does the steps; what they raise is the finding ``name``, and the others go on."""
    try:
        yield from steps
    except Exception as error:
        traceback.print_exc()
        stage.report(name, Outcome.failed, last_line(error))


def promised(stage: Stage) -> None:
    """Reports each goal of the CUDA engine beside what was measured, anew in each attempt, for more may be known."""
    found: dict[str, Finding] = {}
    for case in cases():
        if (finding := stage.finding(case.name)) is not None:
            found[case.name] = finding
    demo = [one for one in stage.other("engines") if "demo" in one.name and "triton" in one.name]
    lines = ["| goal, on one GPU with 7B shapes | promised | measured | verdict |", "| --- | --- | --- | --- |"]
    for goal in goals.goals(found, demo):
        # What stands in for a GPU in a rehearsal meets no promise, and breaks none.
        measured = goal.value is not None and not stage.rehearse
        line = f"a rehearsal judges nothing; here {goal.line}" if stage.rehearse else goal.line
        figures = {} if stage.rehearse else goals.figures(goal)
        stage.report(f"goal: {goal.name}", Outcome.measured if measured else Outcome.skipped, line, **figures)
        value = "" if goal.value is None else f"{goal.value:.3g}"
        verdict = "rehearsed" if stage.rehearse else goal.verdict
        lines.append(f"| {goal.name} | {goal.least:g} | {value} | {verdict} |")
    (stage.folder / "goals.md").write_text("\n".join(lines) + "\n")
