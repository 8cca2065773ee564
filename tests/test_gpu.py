"""What needs a CUDA device: collected everywhere, run where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Run

from harness import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(environment.accelerator() != "cuda", reason="needs a GPU"),
]


@pytest.mark.parametrize("engine", ["fastgen", "baseline"])
def test_sample_in_fp32_on_cuda_gives_hugging_face_ids(
    harness: Callable[..., Run], demo_model: Path, engine: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = harness(f"engine={engine}", "model.dtype=float32", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["device"] == "cuda"
    assert int(run.row["peak_memory_bytes"]) > 2**29  # the weights alone
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).cuda().eval()
    lines = (ROOT / "harness" / "data" / "sample.jsonl").read_text().splitlines()[:16]
    for index, entry in enumerate(map(json.loads, lines)):
        inputs = tokenizer(entry["prompt"], return_tensors="pt").to("cuda")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=entry["output_len"])
        assert run.token_ids[index] == output[0, inputs.input_ids.shape[1] :].tolist()


def test_bfloat16_on_cuda_completes(harness: Callable[..., Run]) -> None:
    run = harness("hardware=h100_80g", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["dtype"] == "bfloat16"
    assert 0 < float(run.row["model_flops_utilisation"]) < 1
