"""Which kernels fastgen takes on CUDA: the early check and the rank, which has the device, say the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import settings

from harness.basics.errors import UserError
from harness.engines.base import EngineSettings
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners import choice
from harness.engines.fastgen.runners.triton import checks as triton_checks
from harness.engines.known_model import KnownModel
from harness.engines.shared import ragged_kernels

FITTING = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 512, "vocab_size": 512}
FITTING |= {"num_attention_heads": 4, "num_key_value_heads": 4}
ODD_RATIO = FITTING | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 1152}
HEADS = "its head size is 16, not one of 64, 80, 96, 128"
RATIO = "9 query to 3 key-value heads is a ratio of 3, not one of 1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71"
PICKLED = ragged_kernels.PICKLED
PHI = "phi3 is not one of the families that they compute (llama, mistral, qwen2, qwen3)"


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the rank find a card that runs all kernels, and DeepSpeed's installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(ragged_kernels, "not_installed", lambda quantization=None: None)


def on_cuda(kernels: Kernels, more: dict[str, Any], pickled: bool = False, family: str = "llama") -> EngineSettings:
    chosen = settings(family, more=more, kernels=kernels)
    return replace(
        chosen, device="cuda:0", dtype="bfloat16", source=replace(chosen.source, kind="directory", pickled=pickled)
    )


def known_of(chosen: EngineSettings) -> KnownModel:
    return KnownModel.of(chosen.source, chosen.dtype, max_context=chosen.max_context)


@pytest.mark.parametrize(
    ("kernels", "more", "pickled", "reason"),
    [
        (Kernels.triton, FITTING, False, None),
        (Kernels.triton, ODD_RATIO, False, None),
        (Kernels.deepspeed, FITTING, False, None),
        (Kernels.torch, FITTING, False, None),
        (Kernels.triton, {}, False, HEADS),
        (Kernels.deepspeed, {}, False, HEADS),
        (Kernels.deepspeed, ODD_RATIO, False, RATIO),
        (Kernels.triton, FITTING, True, PICKLED),
        (Kernels.deepspeed, FITTING, True, PICKLED),
    ],
    ids=str,
)
def test_kernels_that_are_asked_for_are_taken_or_refused(
    a100: None, kernels: Kernels, more: dict[str, Any], pickled: bool, reason: str | None
) -> None:
    chosen = on_cuda(kernels, more, pickled)
    if reason is None:
        choice.check(chosen.engine, known_of(chosen), "cuda")
        runner, note = choice.choose(chosen)
        assert (runner.name, note) == (kernels.value, None)
        return
    refused = f"engine.kernels: {kernels.value}: {reason}; use engine.kernels=torch or auto"
    for attempt in (lambda: choice.check(chosen.engine, known_of(chosen), "cuda"), lambda: choice.choose(chosen)):
        with pytest.raises(UserError) as error:
            attempt()
        assert str(error.value) == refused


@pytest.mark.parametrize(
    ("family", "more", "pickled", "takes", "why"),
    [
        ("llama", FITTING, False, "triton", None),
        ("llama", ODD_RATIO, False, "triton", None),
        ("phi3", FITTING | {"pad_token_id": 0}, False, "deepspeed", f"Triton's kernels: {PHI}"),
        ("llama", {}, False, "torch", f"Triton's kernels: {HEADS}; nor DeepSpeed's kernels: {HEADS}"),
        ("llama", FITTING, True, "torch", f"Triton's kernels: {PICKLED}; nor DeepSpeed's kernels: {PICKLED}"),
    ],
    ids=str,
)
def test_auto_takes_the_first_that_can(
    a100: None, family: str, more: dict[str, Any], pickled: bool, takes: str, why: str | None
) -> None:
    chosen = on_cuda(Kernels.auto, more, pickled, family)
    choice.check(chosen.engine, known_of(chosen), "cuda")
    runner, note = choice.choose(chosen)
    assert runner.name == takes
    assert note == (why and f"engine.kernels=auto took {takes}, not {why}")


def test_what_is_not_on_the_machine_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    old = "Triton's kernels: they need compute capability 8.0, the device has 7.5"
    monkeypatch.setattr(ragged_kernels, "not_installed", lambda quantization=None: "it is not there")
    runner, note = choice.choose(on_cuda(Kernels.auto, FITTING))
    assert runner.name == "torch"
    assert note == f"engine.kernels=auto took torch, not {old}; nor DeepSpeed's kernels: it is not there"
    monkeypatch.setattr(triton_checks, "not_installed", lambda: "neither is this")
    with pytest.raises(UserError, match=r"^engine\.kernels: triton: neither is this; use engine\.kernels=torch"):
        choice.choose(on_cuda(Kernels.triton, FITTING))


def test_a_broken_installation_is_passed_over(a100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "harness.engines.fastgen.runners.triton.runner", None)
    runner, note = choice.choose(on_cuda(Kernels.auto, FITTING))
    assert runner.name == "deepspeed"
    assert note is not None and note.startswith("engine.kernels=auto took deepspeed, not Triton's kernels: import of ")


def test_quantized_weights_are_deepspeeds(a100: None) -> None:
    chosen = on_cuda(Kernels.auto, FITTING)
    chosen = replace(chosen, engine=replace(chosen.engine, quantization="wf6af16"))  # of bfloat16, which it refuses
    with pytest.raises(UserError, match=r"^engine\.quantization: wf6af16: .*float16"):
        choice.choose(chosen)


def test_the_next_kernels_stand_in_for_those_that_fail(a100: None) -> None:
    engine = FastGenEngine(on_cuda(Kernels.auto, FITTING))
    found = [engine.kernels]
    while (other := engine.instead("it computes rubbish")) is not None:
        assert other.notes[-1] == f"engine.kernels=auto took {other.kernels}, not {engine.kernels}: it computes rubbish"
        engine = other
        found.append(engine.kernels)
    assert found == ["triton", "deepspeed", "torch"]
    odd = FastGenEngine(on_cuda(Kernels.auto, ODD_RATIO)).instead("it computes rubbish")
    assert odd is not None and odd.kernels == "torch"
    assert FastGenEngine(on_cuda(Kernels.triton, FITTING)).instead("it computes rubbish") is None
