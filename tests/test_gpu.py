"""What needs a CUDA device: collected everywhere, run where there is one.

DeepSpeed's ragged kernels and MII have files of their own: test_gpu_deepspeed.py and test_gpu_mii.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import SAMPLE, Run

from harness.machine import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.accelerator() != "cuda", reason="needs a GPU"),
]
# As LLaMA-2-7B, four layers of it: heads that kernel injection takes, weights that any device has room for.
SMALL_7B = ["model=llama2_7b", "model.weights=dummy", "model.architecture.num_hidden_layers=4"]


def needs_devices(count: int) -> None:
    """Skips the test on a machine with fewer GPUs."""
    import torch

    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


@pytest.fixture(scope="module")
def on_the_device(demo_model: Path) -> dict[int, list[int]]:
    """Returns what Hugging Face's ``generate`` gives on the device in fp32, by index, for 16 prompts of the sample."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).cuda().eval()
    answers = {}
    for index, entry in enumerate(map(json.loads, SAMPLE.read_text().splitlines()[:16])):
        inputs = tokenizer(entry["prompt"], return_tensors="pt").to("cuda")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=entry["output_len"])
        answers[index] = output[0, inputs.input_ids.shape[1] :].tolist()
    return answers


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine=fastgen", "engine.kernels=torch"],
        ["engine=fastgen"],  # auto: three query heads to a key-value head are not among the kernels' ratios
        ["engine=baseline"],
        ["engine=ds_inference"],
        ["engine=ds_inference", "engine.cuda_graph=true"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_sample_in_fp32_on_cuda_gives_hugging_face_ids(
    harness: Callable[..., Run], on_the_device: dict[int, list[int]], overrides: list[str]
) -> None:
    run = harness(*overrides, "model.dtype=float32", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["device"] == "cuda"
    assert int(run.row["peak_memory_bytes"]) > 2**29  # the weights alone
    assert run.token_ids == on_the_device


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine=fastgen", "parallel.tp=2"],
        ["engine=fastgen", "parallel.dp=2"],
        ["engine=ds_inference", "parallel.tp=2"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_two_gpus_give_the_same_ids(
    harness: Callable[..., Run], on_the_device: dict[int, list[int]], overrides: list[str]
) -> None:
    needs_devices(2)
    run = harness(*overrides, "model.dtype=float32", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.token_ids == on_the_device


@pytest.mark.parametrize("engine", ["fastgen", "ds_inference"])
def test_bfloat16_on_cuda_completes(harness: Callable[..., Run], engine: str) -> None:
    run = harness(f"engine={engine}", "hardware=h100_80g", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["dtype"] == "bfloat16"
    assert 0 < float(run.row["model_flops_utilisation"]) < 1
    proof = run.record["proof"]
    assert proof["layers"] is None and proof["largest_distance"] <= proof["bound"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_injected_kernels_pass_their_check_or_are_refused_in_one_line(harness: Callable[..., Run], dtype: str) -> None:
    """Whether they compute the model is for the check to say; a wrong answer or a traceback is not allowed."""
    overrides = [*SMALL_7B, f"model.dtype={dtype}", "dataset.num_samples=16"]
    run = harness("engine=ds_inference", "engine.kernel_inject=true", *overrides, DS_ACCELERATOR="cuda")
    if run.status == 0:
        assert (run.row["kernels"], run.row["completed"]) == ("injected", "16")
    else:
        assert run.status == 2
        assert run.stderr.startswith("error: engine.kernel_inject: true: DeepSpeed") and run.stderr.count("\n") == 1


def test_llama2_7b_with_made_up_weights_runs(harness: Callable[..., Run]) -> None:
    overrides = ["model=llama2_7b", "model.weights=dummy", "hardware=h100_80g", "generation.stop=length"]
    job = ["dataset=synthetic", "dataset.prompt=random", "dataset.num_samples=32"]
    run = harness("engine=ds_inference", *overrides, *job, DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert (run.row["model"], run.row["completed"]) == ("llama2_7b", "32")
    assert int(run.row["output_tokens"]) == 32 * 64
