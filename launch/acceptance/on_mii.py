"""Stage mii: DeepSpeed-MII, and fastgen with DeepSpeed's kernels, on the same requests of tiny models.

The models are such that both take them, and ``harness.verify`` judges both. Stock MII rounds rotary frequencies to the
activations' type (results/NOTES.md), which shows in long prompts: what is wrong in those alone is written down as that,
and is no failure.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

from acceptance import tiny_models
from acceptance.cases import (
    Case,
    at_once,
    check_judged,
    expected,
    judged_steps,
    one_thread,
    possible,
    reported,
    within,
)
from acceptance.commands import Steps, command, together
from acceptance.findings import Outcome
from acceptance.harness_run import Verdict, harness_run
from acceptance.stage import Stage
from harness.results.completions import read_completions

LONG = 512  # tokens of a prompt from which on MII's rotary frequencies may decide
DTYPES = ("bfloat16", "float16")
NOT_INSTALLED = "^engine: mii is not installed"
OTHER_CARD = "they have code for compute capability 8.0 to 9.0"
DEEPSPEED = ("engine=fastgen", "engine.kernels=deepspeed")
OURS = tuple(
    Case(f"tiny {name} {dtype} fastgen deepspeed", (f"model.dtype={dtype}", *DEEPSPEED), refusal=OTHER_CARD, model=name)
    for name, dtype in (
        *(("llama", dtype) for dtype in DTYPES),
        *((name, "bfloat16") for name in ("llama-128", "mistral", "qwen2", "phi3")),
    )
)
THEIRS = tuple(
    Case(
        f"tiny llama {dtype} mii",
        (f"model.dtype={dtype}", "engine=mii", "engine.kv_memory=2GiB"),
        refusal=f"{NOT_INSTALLED}|{OTHER_CARD}",
        model="llama",
    )
    for dtype in DTYPES
)
ON_CPU = Case("mii on a CPU", ("engine=mii",), refusal="^engine: mii needs CUDA, and this run is on cpu")
EMULATED = "mii over the tests' forward pass"


def run(stage: Stage) -> None:
    """Runs the stage."""
    if stage.rehearse:
        rehearse(stage)
        return
    models = stage.folder / "models"
    try:
        check_judged(stage, possible(stage, OURS), models)
        check_mii(stage, possible(stage, THEIRS), models)
    finally:
        shutil.rmtree(models, ignore_errors=True)


def check_mii(stage: Stage, cases: list[Case], models: Path) -> None:
    """Reports for each case whether ``harness.verify`` finds MII's tokens right, those of long prompts apart."""
    if not cases:
        return
    together([tiny_models.write_steps(stage, models, sorted({str(case.model) for case in cases}))], 1)
    together([reported(stage, case, _but_for_long_prompts(stage, case, models)) for case in cases], at_once(stage))


def _but_for_long_prompts(stage: Stage, case: Case, models: Path) -> Steps[Verdict]:
    """Returns the verdict; no failure where nothing but what MII is known to compute wrongly is wrong."""
    verdict = yield from judged_steps(stage, case, models)
    if verdict.outcome is not Outcome.failed or not verdict.wrong:
        return verdict
    lines = read_completions(stage.results / str(verdict.figures["run_id"]) / "completions.jsonl")
    if set(verdict.wrong) - {line["index"] for line in lines if line["prompt_tokens"] > LONG}:
        return verdict
    known = f"of prompts longer than {LONG} tokens alone, for which MII's rotary frequencies are too coarse"
    return replace(verdict, outcome=Outcome.measured, detail=f"wrong {known}: {verdict.detail}")


def rehearse(stage: Stage) -> None:
    """Has MII refused, as it is on a CPU, and its real pipeline run over the tests' forward pass."""
    if not stage.done(ON_CPU.name):
        run = harness_run(stage, ON_CPU.name, *ON_CPU.overrides, timeout_s=within(stage, 0))
        found = Verdict(Outcome.refused if run.refused else Outcome.failed, run.how, {})
        expected(found, ON_CPU.refusal).report(stage, ON_CPU.name)
    if stage.done(EMULATED):
        return
    missing = [name for name in ("mii", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        stage.report(EMULATED, Outcome.skipped, f"{' and '.join(missing)} not installed")
        return
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_mii.py", "-k", "hugging_faces and everything"]
    ended = command(stage, EMULATED, words, within(stage, 0), one_thread(stage))
    last = (ended.stdout.strip().splitlines() or [ended.how])[-1]
    stage.report(EMULATED, Outcome.passed if ended.status == 0 else Outcome.failed, last)
