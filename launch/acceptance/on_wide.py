"""The stage ``wide``: models of few layers, as wide as LLaMA-2-7B and 70B, on every kernel that fastgen has.

Logits of a ragged batch, with prompts cut over several passes and decodes beside them, against Hugging Face's in
float32; Hugging Face's own in the same 16-bit type say how far rounding goes. In a rehearsal models are tiny, Triton's
kernels are interpreted and DeepSpeed's stood for.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from support import interpreter

from acceptance import built
from acceptance.findings import Outcome
from acceptance.stage import Check, Stage
from harness.basics.errors import UserError
from harness.engines.fastgen.config import Kernels
from harness.engines.shared import deepspeed_ops, ragged_kernels
from harness.engines.shared.unusable import Unusable
from harness.machine.device import accelerator

if TYPE_CHECKING:
    from support.wide import Model

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "cuda": (Kernels.triton, Kernels.torch, Kernels.deepspeed),
    "cpu": (Kernels.triton, Kernels.torch, Kernels.native, Kernels.deepspeed),
}
LAYERS = 2  # show every product, norm and head


@dataclass(frozen=True)
class Case:
    """A model as wide as one of conf/model.

    Attributes:
        conf: its file there.
        more: what is not as there.
        tiny: what is not as there in a rehearsal.
        left_out: kernels that cannot compute it.
    """

    name: str
    conf: str
    dtype: str
    more: dict[str, int] = field(default_factory=dict)
    tiny: dict[str, int] = field(default_factory=dict)
    left_out: tuple[Kernels, ...] = ()


TINY = {"hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": 320}
# What one rank of eight has of 70B; DeepSpeed's kernels want as many heads as make up the hidden size.
SLICE = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 3584}
CASES = (
    Case("7B", "llama2_7b", "bfloat16", tiny=TINY | {"num_key_value_heads": 8}),
    Case("70B", "llama2_70b", "bfloat16", tiny=TINY | {"num_key_value_heads": 1}),
    Case("7B", "llama2_7b", "float16"),
    Case("70B over 8 ranks", "llama2_70b", "bfloat16", SLICE | {"vocab_size": 4000}, left_out=(Kernels.deepspeed,)),
)


def run(stage: Stage) -> None:
    """Reports a finding a model, type and kind of kernels."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if stage.rehearse:
        _stand_ins()
    for case in CASES:
        if case.tiny or not stage.rehearse:
            _check(stage, case)


def _check(stage: Stage, case: Case) -> None:
    kernels = [one for one in KERNELS[stage.device] if one not in case.left_out]
    names = {one: f"{case.name} {case.dtype}, {one.value}" for one in kernels}
    reference = f"{case.name} {case.dtype}, Hugging Face"
    before = stage.finding(reference) if stage.done(reference) else None
    if all(map(stage.done, names.values())) or (before and before.outcome is Outcome.failed):
        return
    model = None
    with tempfile.TemporaryDirectory(prefix="acceptance-wide-") as directory:
        with stage.check(reference) as found:  # at every start, for the others are compared with it
            model = _model(stage, Path(directory), case)
            found.outcome, found.detail = Outcome.measured, "mean distance from float32, and deviation of logits"
            found.figures |= model.usual()
        for one, name in names.items():
            if model is not None and not stage.done(name):
                with stage.check(name) as found:
                    _compare(stage, model, one, found)
                _forget()


def _compare(stage: Stage, model: Model, kernels: Kernels, found: Check) -> None:
    from support.wide import runner_of

    if kernels is Kernels.deepspeed and not stage.rehearse and ragged_kernels.not_installed() is None:
        reason = built.missing(stage)
        if reason is not None:
            found.outcome, found.detail = Outcome.refused, reason
            return
    try:
        runner = runner_of(model, kernels, stage.rehearse)
        distance = model.distance(runner)
    except Unusable:
        raise  # they can compute it, and should have been had
    except UserError as error:
        found.outcome, found.detail = Outcome.refused, str(error)
        return
    found.detail = "distance of logits from float32, as a multiple of Hugging Face's"
    found.figures |= {
        "ratio": distance.ratio,
        "distance": distance.ours,
        "hugging_face": distance.theirs,
        "rows": distance.rows,
        "worst_gap_deviations": distance.gap,
    }
    distance.check(model.dtype)


def _model(stage: Stage, directory: Path, case: Case) -> Model:
    from support.models import save_wide
    from support.wide import Model, Work

    text = (ROOT / "conf" / "model" / f"{case.conf}.yaml").read_text()
    sizes: dict[str, Any] = yaml.safe_load(text)["architecture"] | {"num_hidden_layers": LAYERS} | case.more
    work = Work((900, 1, 300, 33, 128, 64), (9, 12, 5, 10, 2, 11), budget=256)
    if stage.rehearse:
        sizes |= case.tiny | {"num_hidden_layers": 1}
        work = Work((30, 1, 6), (2, 3, 2), budget=16, block_size=16)
    for key in ("model_type", "dtype"):
        sizes.pop(key)
    save_wide(directory, getattr(torch, case.dtype), stage.device, **sizes)
    return Model(directory, case.dtype, stage.device, work, sizes["vocab_size"])


def _stand_ins() -> None:
    """Has Triton interpreted and DeepSpeed's kernels stood for, in this process."""
    if accelerator() != "cpu":
        raise RuntimeError("a rehearsal needs DS_ACCELERATOR=cpu")
    interpreter.interpret()
    from support.deepspeed_kernels import emulate

    emulate(setattr)
    deepspeed_ops.load = _nothing  # there is nothing to be compiled


def _nothing(names: Sequence[str], aloud: bool = True) -> None:
    return


def _forget() -> None:
    """Gives back what a runner held of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
