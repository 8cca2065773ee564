"""Which kernels fastgen takes on CUDA: the early check and the rank, which has the device, say the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import settings

from harness.basics.errors import UserError
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.known_model import KnownModel
from harness.engines.shared import ragged_kernels

FITTING = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 512, "vocab_size": 512}
FITTING |= {"num_attention_heads": 4, "num_key_value_heads": 4}
HEADS = "its head size is 16, not one of 64, 80, 96, 128"
PICKLED = ragged_kernels.PICKLED


@pytest.mark.parametrize(
    ("kernels", "more", "pickled", "reason"),
    [
        (Kernels.auto, FITTING, False, None),
        (Kernels.deepspeed, FITTING, False, None),
        (Kernels.auto, {}, False, HEADS),
        (Kernels.deepspeed, {}, False, HEADS),
        (Kernels.auto, FITTING, True, PICKLED),
        (Kernels.deepspeed, FITTING, True, PICKLED),
        (Kernels.torch, FITTING, False, None),
    ],
    ids=str,
)
def test_the_rank_takes_what_the_check_lets_through(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, more: dict[str, Any], pickled: bool, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(ragged_kernels, "not_installed", lambda quantization=None: None)
    chosen = settings(more=more, kernels=kernels)
    chosen = replace(chosen, device="cuda:0", dtype="bfloat16", source=replace(chosen.source, pickled=pickled))
    known = KnownModel.of(chosen.source, chosen.dtype, max_context=chosen.max_context)
    if reason is not None and kernels is Kernels.deepspeed:
        refused = f"engine.kernels: deepspeed: {reason}; use engine.kernels=torch or auto"
        for attempt in (lambda: choice.check(chosen.engine, known, "cuda"), lambda: choice.choose(chosen)):
            with pytest.raises(UserError) as error:
                attempt()
            assert str(error.value) == refused
        return
    choice.check(chosen.engine, known, "cuda")
    runner, note = choice.choose(chosen)
    assert runner.name == ("torch" if reason is not None or kernels is Kernels.torch else "deepspeed")
    expected = None if reason is None else f"engine.kernels=auto took torch, not DeepSpeed's kernels: {reason}"
    assert note == expected
