"""Stage engines: every engine on the demo model and on tiny models of several families.

In float32 an engine gives the very ids of Hugging Face's ``generate`` on the same device, or ones that
``harness.verify`` finds to be near-ties; in 16 bits ``verify`` judges every token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from acceptance.cases import (
    RUN_S,
    VERIFY_S,
    Case,
    at_once,
    check_judged,
    on_device,
    one_thread,
    possible,
    reported,
    requests,
    run_steps,
    within,
)
from acceptance.commands import Running, Steps, end, started, together
from acceptance.findings import Outcome
from acceptance.harness_run import HarnessRun, Verdict, figures_of, verdict_steps
from acceptance.stage import Stage
from harness.models import demo


def _demo(dtype: str, what: str, *overrides: str, **more: Any) -> Case:
    return Case(f"demo {dtype} {what}", (f"model.dtype={dtype}", *overrides), **more)


def _tiny(name: str, what: str, *overrides: str, **more: Any) -> Case:
    case = Case(f"tiny {name} bfloat16 fastgen triton{what}", ("model.dtype=bfloat16", *TRITON, *overrides), **more)
    return replace(case, refusal=OLD_CARD, model=name)


GENERATE = "demo float32 generate"
NO_GRAPH = "^engine.cuda_graph: true needs CUDA"
OLD_CARD = "^engine.kernels: triton: they need compute capability"
TRITON = ("engine=fastgen", "engine.kernels=triton")
GRAPH = ("engine=ds_inference", "engine.cuda_graph=true")
EXACT = (
    _demo("float32", "baseline", "engine=baseline"),
    _demo("float32", "ds_inference", "engine=ds_inference"),
    _demo("float32", "ds_inference cuda_graph", *GRAPH, refusal=NO_GRAPH),
    _demo("float32", "fastgen torch", "engine=fastgen", "engine.kernels=torch"),
    _demo("float32", "fastgen auto", "engine=fastgen"),  # neither Triton's nor DeepSpeed's compute in float32
)
ON_TWO = (
    _demo("float32", "fastgen tp=2", "engine=fastgen", "parallel.tp=2", gpus=2),
    _demo("float32", "fastgen dp=2", "engine=fastgen", "parallel.dp=2", gpus=2),
    _demo("float32", "ds_inference tp=2", "engine=ds_inference", "parallel.tp=2", gpus=2),
)
JUDGED = (
    _demo("bfloat16", "fastgen triton", *TRITON, refusal=OLD_CARD, repeated=True),
    _demo("float16", "fastgen triton", *TRITON, refusal=OLD_CARD),
    _demo("bfloat16", "fastgen torch", "engine=fastgen", "engine.kernels=torch", repeated=True),
    _demo("bfloat16", "ds_inference", "engine=ds_inference"),
    _demo("float16", "ds_inference cuda_graph", *GRAPH),
    _demo("bfloat16", "baseline", "engine=baseline"),
)
FAMILIES = (
    *(_tiny(name, "") for name in ("llama", "mistral", "qwen2", "qwen3")),
    _tiny("llama", " tp=2", "parallel.tp=2", gpus=2),
)
# Each takes a CPU ten seconds, most of them to import what it needs.
REHEARSED = ("demo float32 baseline", "demo float32 ds_inference cuda_graph", "demo float32 fastgen auto")
TINY_ON_CPU = ("model.dtype=float32", "engine=ds_inference")
REHEARSED_TINY = (Case("tiny llama float32 ds_inference", TINY_ON_CPU, model="llama"),)


def run(stage: Stage) -> None:
    """Runs the stage."""
    models = stage.folder / "models"
    exact: tuple[Case, ...] = (*EXACT, *ON_TWO)
    judged: tuple[tuple[Case, ...], ...] = (JUDGED, FAMILIES)
    if stage.rehearse:
        exact, judged = tuple(case for case in EXACT if case.name in REHEARSED), (REHEARSED_TINY,)
    try:
        check_exact(stage, possible(stage, exact))
        for cases in judged:
            check_judged(stage, possible(stage, cases), models)
    finally:
        shutil.rmtree(models, ignore_errors=True)  # written again in seconds, and larger than all else of a stage


def check_exact(stage: Stage, cases: Sequence[Case]) -> None:
    """Reports for each case whether its ids are those of Hugging Face's ``generate`` on the device."""
    if not cases:
        return
    answers = _answers(stage)
    try:
        together([reported(stage, case, _exact(stage, case, answers)) for case in cases], at_once(stage))
    finally:
        end([answers])


def _answers(stage: Stage) -> Running:
    """Starts what prints Hugging Face's ids; each case waits for them only once its own run is through."""
    words = ["-m", "acceptance.answers", str(demo.ensure()), *map(str, requests(stage)), stage.device]
    return started(stage, "answers", words, within(stage, RUN_S), one_thread(stage))


def _exact(stage: Stage, case: Case, answers: Running) -> Steps[Verdict]:
    run = yield from run_steps(stage, case)
    ended = yield answers
    expected: dict[int, list[int]] = {}  # without them verify has to judge all
    if ended.status == 0:
        expected = {int(index): ids for index, ids in json.loads(ended.stdout).items()}
    elif not stage.done(GENERATE):
        stage.report(GENERATE, Outcome.failed, ended.how)
    return (yield from _compared(stage, case, run, expected))


def _compared(stage: Stage, case: Case, run: HarnessRun, expected: dict[int, list[int]]) -> Steps[Verdict]:
    """Compares ids; those that differ are for ``verify`` to judge."""
    if not run.ok or run.token_ids != expected:
        verdict = yield from verdict_steps(stage, case.name, run, timeout_s=within(stage, VERIFY_S))
        same = sum(run.token_ids.get(index) == ids for index, ids in expected.items())
        if run.ok:
            verdict.detail = f"{same} of {len(expected)} as generate's on {stage.device}; {verdict.detail}"
        return on_device(stage, run, verdict)
    detail = f"the ids of Hugging Face's generate on {stage.device}, {len(expected)} requests"
    return on_device(stage, run, Verdict(Outcome.passed, detail, figures_of(run)))
