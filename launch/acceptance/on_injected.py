"""Stage injected: DeepSpeed's kernel injection, built first, on a model of LLaMA-2-7B's width.

Injection was written for earlier transformers. It either computes the model, which the harness proves before its clock
and ``harness.verify`` afterwards, or it is refused in one line that names DeepSpeed.
"""

from __future__ import annotations

from acceptance import on_builds
from acceptance.cases import VERIFY_S, expected, one_thread, within
from acceptance.findings import Outcome
from acceptance.harness_run import Verdict, harness_run, verdict
from acceptance.stage import Stage

RUN_S = 150.0
MODEL = ("model=llama2_7b", "model.weights=dummy", "model.architecture.num_hidden_layers=4")
INJECTED = ("engine=ds_inference", "engine.kernel_inject=true")
REFUSAL = "^engine.kernel_inject: true: DeepSpeed"
NO_CUDA = "^engine.kernel_inject: true needs CUDA"


def run(stage: Stage) -> None:
    """Runs the stage."""
    if not stage.rehearse:
        from harness.engines.shared import deepspeed_ops

        on_builds.extensions(stage, deepspeed_ops.INJECTED)
    for dtype in ("float16", "bfloat16"):
        if not stage.done(name := f"7B-wide {dtype} kernel_inject"):
            injected(stage, name, dtype)


def injected(stage: Stage, name: str, dtype: str) -> None:
    """Reports whether injected kernels compute the model, or say that they do not."""
    words = [*INJECTED, *MODEL, f"model.dtype={dtype}", "dataset.num_samples=16"]
    run = harness_run(stage, name, *words, timeout_s=within(stage, RUN_S), env=one_thread(stage))
    found = verdict(stage, name, run, timeout_s=within(stage, VERIFY_S))
    if run.ok and run.row is not None and (run.row["kernels"], run.row["completed"]) != ("injected", "16"):
        detail = f"{run.row['completed']} of 16 requests with {run.row['kernels']} kernels"
        found = Verdict(Outcome.failed, detail, found.figures)
    expected(found, NO_CUDA if stage.rehearse else REFUSAL).report(stage, name)
