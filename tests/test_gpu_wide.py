"""Every runner's logits on a GPU, of a ragged batch in a LLaMA model with heads as wide as real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from support.models import save_wide
from support.wide import Model, Work, runner_of

from harness.basics.errors import UserError
from harness.engines.fastgen.config import Kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")]
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 3200}
WORK = Work((300, 1, 100, 33, 128, 64), (9, 12, 5, 10, 2, 11), budget=128)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [8, 1])
def test_no_runner_is_further_from_float32_than_hugging_face(tmp_path: Path, kv_heads: int, dtype: str) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads}
    save_wide(tmp_path, getattr(torch, dtype), DEVICE, **SIZES, **heads)
    model = Model(tmp_path, dtype, DEVICE, WORK, SIZES["vocab_size"])
    refused = {}
    for kernels in (Kernels.triton, Kernels.deepspeed, Kernels.torch):
        try:
            runner = runner_of(model, kernels)
        except UserError as error:  # not installed, perhaps
            refused[kernels] = str(error)
            continue
        model.distance(runner).check(dtype)
    assert Kernels.torch not in refused and Kernels.triton not in refused, refused
