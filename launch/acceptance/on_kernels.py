"""The stage ``kernels``: our Triton kernels and PyTorch's paged attention against float64, and what they reach.

Attention is of ragged batches: decodes beside chunks that begin prompts and go on with them, over scattered blocks,
where every block and place that is not the sequence's own is NaN. In a rehearsal Triton is interpreted on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

from support import interpreter

from acceptance.findings import Outcome
from acceptance.stage import Stage
from harness.machine.device import accelerator

if TYPE_CHECKING:
    import torch
    from support.attention import Ragged

    from acceptance.kernel_cases import Heads

REHEARSED = "interpreted on a CPU: the figure says nothing"


def run(stage: Stage) -> None:
    """Checks every kernel, then times some."""
    if importlib.util.find_spec("triton") is None:
        stage.report("triton", Outcome.skipped if stage.rehearse else Outcome.failed, "the package is not installed")
        return
    if stage.rehearse and accelerator() != "cpu":
        stage.report("triton", Outcome.failed, "a rehearsal needs DS_ACCELERATOR=cpu, for Triton to be interpreted")
        return
    interpreter.interpret()  # before a kernel is imported; nothing happens on a GPU
    from acceptance import kernel_cases as cases

    for heads in cases.TINY_HEADS if stage.rehearse else cases.HEADS:
        for dtype in heads.dtypes:
            _attention(stage, heads, dtype)
    for name, checks in cases.between(cases.TINY_SIZES if stage.rehearse else cases.SIZES, stage.device):
        _worst(stage, name, checks)
    _times(stage)


def _attention(stage: Stage, heads: Heads, dtype: torch.dtype) -> None:
    from acceptance import kernel_cases as cases

    kind = str(dtype).removeprefix("torch.")
    whats = ("attention", "attention of PyTorch", "attention repeated", "attention in a CUDA graph")
    names = [f"{what}, {heads.name} {kind}" for what in whats]
    if all(stage.done(name) for name in names):
        return

    @cache
    def ragged() -> Ragged:
        return heads.ragged(cases.TINY_SPANS if stage.rehearse else cases.SPANS, dtype, stage.device)

    ours, theirs, repeated, in_graph = names
    splits = max(heads.splits)
    _worst(stage, ours, {f"parts_{each}": partial(lambda parts: ragged().check(parts), each) for each in heads.splits})
    _worst(stage, theirs, {"whole": lambda: ragged().check_torch()})
    if not stage.done(repeated):
        with stage.check(repeated):
            ragged().check_repeats(splits, 1 if stage.rehearse else 20)
    if stage.rehearse and not stage.done(in_graph):
        stage.report(in_graph, Outcome.skipped, "CUDA graphs need CUDA")
    if not stage.done(in_graph):
        with stage.check(in_graph):
            ragged().check_graph(splits)


def _worst(stage: Stage, name: str, checks: dict[str, Callable[[], float]]) -> None:
    """Does the checks of one name; its figures are how much of each bound was used."""
    if stage.done(name):
        return
    with stage.check(name) as found:
        wrong = []
        for size, check in checks.items():
            try:
                found.figures[size] = check()
            except AssertionError as error:
                wrong.append(f"{size}: {error}")
        found.detail = "; ".join(wrong) or "largest error as a share of its bound"
        if wrong:
            found.outcome = Outcome.failed


def _times(stage: Stage) -> None:
    import torch

    from acceptance import kernel_times

    rates = {"bytes_per_s": "copy_bytes_per_s", "flops_per_s": "bf16_flops"}  # and what the stage machine measured
    size = kernel_times.TINY if stage.rehearse else kernel_times.REAL
    for name, make in kernel_times.all_of(size, torch.bfloat16, stage.device).items():
        if stage.done(name):
            continue
        with stage.check(name) as found:
            found.outcome = Outcome.measured
            found.detail = REHEARSED if stage.rehearse else "CUDA events"
            timed = make()
            seconds = found.figures["seconds"] = kernel_times.seconds_of(timed, stage.device)
            key, amount = ("bytes_per_s", timed.bytes_moved) if timed.bytes_moved else ("flops_per_s", timed.flops)
            found.figures |= {key: amount / seconds, "parts": timed.parts}
            best = stage.figure("machine", rates[key])
            if best and not stage.rehearse:
                found.figures[f"share_of_{rates[key]}"] = amount / seconds / float(best)
