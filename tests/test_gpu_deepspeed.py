"""DeepSpeed's own CUDA kernels behind our runner: collected everywhere, run where they can be.

The first test that runs compiles them, about 15 CPU-minutes; they are kept for later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import op_batches, op_cases
from support.ragged import Judge, gap_of, generate, loaded, requests, save, settings
from support.runs import Run

from harness.engines.base import EngineSettings
from harness.engines.shared import ragged_kernels as checks
from harness.machine import device

CUDA = device.accelerator() == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a GPU"),
    pytest.mark.skipif(
        CUDA and checks.not_installed() is not None, reason=f"DeepSpeed's kernels: {checks.not_installed()}"
    ),
]

ROUNDING = {"float16": 0.02, "bfloat16": 0.15}  # of the logits' standard deviation; a wrong token is off by 1 to 3


def on_gpu(directory: Path, dtype: str = "float16", **engine: Any) -> EngineSettings:
    return dataclasses.replace(settings(directory, dtype, **engine), device="cuda:0")


@pytest.fixture(scope="module")
def ops() -> op_cases.Compiled:
    return op_cases.Compiled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [op_batches.TINY, op_batches.LLAMA[-1]], ids=lambda sizes: sizes.name)
def test_every_op_computes_what_its_stand_in_does(
    ops: op_cases.Compiled, sizes: op_batches.Sizes, dtype: torch.dtype
) -> None:
    fp6 = torch.cuda.get_device_capability()[0] == 8 and dtype is torch.float16
    for make in op_cases.cases(sizes, dtype, "cuda", fp6).values():
        make().check(ops, "cuda")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", checks.FAMILIES)
def test_every_family_gives_hugging_faces_tokens(tmp_path: Path, family: str, dtype: str) -> None:
    directory = save(tmp_path, family, getattr(torch, dtype))
    assert gap_of(loaded(on_gpu(directory, dtype)), Judge(directory), requests(12)) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"hidden_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ],
    ids=str,
)
def test_every_shape_gives_hugging_faces_tokens(tmp_path: Path, more: dict[str, Any]) -> None:
    directory = save(tmp_path, **more)
    block_size = 64 if more.get("hidden_size") == 768 else 128
    runner = loaded(on_gpu(directory, kv_block_size=block_size))
    assert runner.block_size == block_size
    assert gap_of(runner, Judge(directory), requests(8)) < ROUNDING["float16"]


def test_positions_are_exact_far_into_a_context(tmp_path: Path) -> None:
    directory = save(tmp_path, dtype=torch.bfloat16, sharp=2.0)
    ids = torch.randint(3, 320, (1800,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = Judge(directory).model(ids[None]).logits[0, -1]
    runner = loaded(on_gpu(directory, "bfloat16", token_budget=1800))
    runner.engine.put([0], [ids[:-1]], do_checks=False)
    found = runner.engine.put([0], [ids[-1:]], do_checks=False)[0].float().cpu()
    # 0.06 with exact frequencies, 0.48 with DeepSpeed's rounded ones, when the kernels' arithmetic was done on a CPU.
    assert float((found - logits).abs().mean() / logits.std()) < 0.15


def test_preemption_changes_no_token(tmp_path: Path) -> None:
    directory = save(tmp_path)
    jobs = requests(12, lengths=(1, 100, 110, 120, 124, 127, 128), most=40)
    runner = loaded(on_gpu(directory, token_budget=100, max_sequences=4), 3)
    found, engine = generate(runner, jobs, 3)
    assert engine.statistics.preemptions
    ids = {index: completion.token_ids for index, completion in found.items()}
    assert Judge(directory).worst_gap(jobs, ids) < ROUNDING["float16"]
    assert runner.engine.free_blocks == [3]


def test_long_prompts_have_room_for_their_attention_atoms(tmp_path: Path) -> None:
    directory = save(tmp_path)
    jobs = requests(2, lengths=(1500,))
    runner = loaded(on_gpu(directory, token_budget=1600, max_sequences=2))
    assert gap_of(runner, Judge(directory), jobs) < ROUNDING["float16"]


def test_fp6_weights_stay_near(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability()[0] != 8 or checks.not_installed("wf6af16") is not None:
        pytest.skip("needs an A100 and qtorch")
    directory = save(tmp_path)
    assert gap_of(loaded(on_gpu(directory, quantization="wf6af16")), Judge(directory), requests(8)) < 1.5


SEVEN_BILLION = (
    "engine=fastgen",
    "engine.kernels=deepspeed",
    "model=llama2_7b",
    "model.weights=dummy",
    "model.dtype=float16",
    "dataset=synthetic",
    "dataset.prompt=random",
    "dataset.num_samples=16",
    "dataset.input_len=500",
    "dataset.output_len=16",
    "generation.stop=length",
)


@pytest.mark.parametrize("tp", [1, 2])
def test_llama_7b_with_dummy_weights(harness: Callable[..., Run], tp: int) -> None:
    if torch.cuda.device_count() < tp:
        pytest.skip(f"needs {tp} GPUs")
    run = harness(*SEVEN_BILLION, f"parallel.tp={tp}", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["kernels"] == "deepspeed"
    assert {len(ids) for ids in run.token_ids.values()} == {16}
    assert int(run.row["peak_memory_bytes"]) > 13.0e9 / tp  # the weights alone
    assert int(run.row["total_tokens"]) == 16 * 516


def test_unsupported_models_fall_back_or_are_refused(harness: Callable[..., Run], demo_model: Path) -> None:
    run = harness("dataset.num_samples=4", "model.dtype=float32", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["kernels"] == "torch"
    assert any("not in float32; nor DeepSpeed's kernels: " in note for note in run.record["notes"])


def test_explicit_kernels_are_refused_in_one_line(harness: Callable[..., Run], demo_model: Path) -> None:
    run = harness("engine.kernels=deepspeed", DS_ACCELERATOR="cuda")
    assert run.status == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "engine.kernels: " in line and "a ratio of 3" in line
