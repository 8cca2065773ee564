"""Driving DeepSpeed's injected layers, by a stand-in: the layers themselves need CUDA (tests/test_gpu.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import LayersThatRemember, engine_for, generate, hugging_face, ids, requests

from harness.basics.errors import UserError
from harness.engines.ds_inference.checks import check_injection
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.workload.records import Request


def test_batches_of_all_rows_give_hugging_face_ids() -> None:
    engine = engine_for(batch_size=4, batch_tokens=4 * 190)
    engine.batches.injected = InjectedBatch(LayersThatRemember(4), 4, "cpu", torch.float32)
    jobs = [
        *requests(14, seed=11),
        Request(14, "", 20, prompt_ids=tuple([7] * 180)),
        Request(15, "", 4, prompt_ids=(9,)),
    ]
    found = generate(engine, jobs)
    assert found[14].finish_reason == "rejected"
    assert "190 columns of a row (engine.batch_tokens / engine.batch_size)" in (found[14].error or "")
    jobs.pop(14)
    assert {**ids(found), 14: []} == {**hugging_face(engine.settings.source, jobs), 14: []}


@pytest.mark.parametrize(
    ("more", "tp", "why"),
    [
        ({"model_type": "qwen2"}, 1, "has no kernels for qwen2 models"),
        ({"num_key_value_heads": 2}, 1, "has no grouped heads, the model has 4 query and 2 key-value heads"),
        ({"head_dim": 32}, 1, "takes heads of 16, the model's are of 32"),
        ({"attention_bias": True}, 1, "drops the biases"),
        ({}, 3, "cuts heads evenly, 4 do not go into 3 ranks"),
    ],
)
def test_what_injection_cannot_compute_is_refused_by_name(more: dict[str, Any], tp: int, why: str) -> None:
    plain = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    check_injection(plain, 2)
    with pytest.raises(UserError, match=why):
        check_injection(plain | more, tp)
