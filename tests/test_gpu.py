"""What needs a CUDA device: collected everywhere, run where there is one.

Most of it is what the acceptance suite checks (launch/acceptance), in the same words: each test here is a group of its
findings. Triton's kernels and DeepSpeed's have files of their own, with the same checks in small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import ROOT, Run

from harness.machine import device

sys.path.insert(0, str(ROOT / "launch"))

from acceptance import on_engines, on_failures, on_injected, on_mii
from acceptance.cases import check_judged, possible
from acceptance.findings import Outcome
from acceptance.stage import Stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.accelerator() != "cuda", reason="needs a GPU"),
]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("gpu", tmp_path)


def assert_nothing_failed(stage: Stage) -> None:
    found = stage.other(stage.name)
    assert found
    assert not [finding.line() for finding in found if finding.outcome is Outcome.failed]


def test_engines_in_float32_give_hugging_faces_ids(stage: Stage) -> None:
    """On the demo model; tp=2 and dp=2 where there are two GPUs."""
    on_engines.check_exact(stage, possible(stage, (*on_engines.EXACT, *on_engines.ON_TWO)))
    assert_nothing_failed(stage)


def test_engines_in_16_bits_give_tokens_that_verify_finds_right(stage: Stage) -> None:
    check_judged(stage, possible(stage, on_engines.JUDGED), stage.folder)
    assert_nothing_failed(stage)


def test_triton_computes_every_family(stage: Stage) -> None:
    check_judged(stage, possible(stage, on_engines.FAMILIES), stage.folder)
    assert_nothing_failed(stage)


def test_mii_and_deepspeeds_kernels_give_tokens_that_verify_finds_right(stage: Stage) -> None:
    on_mii.run(stage)
    assert_nothing_failed(stage)


def test_runs_that_fail_or_are_killed_say_so_and_can_be_resumed(stage: Stage) -> None:
    """Memory that runs out, SIGTERM and SIGKILL, a timeout; telemetry, and GPUs by their UUIDs."""
    on_failures.run(stage)
    assert_nothing_failed(stage)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_injected_kernels_compute_the_model_or_are_refused_in_one_line(stage: Stage, dtype: str) -> None:
    on_injected.injected(stage, dtype, dtype)
    assert_nothing_failed(stage)


@pytest.mark.parametrize("engine", ["fastgen", "ds_inference"])
def test_bfloat16_is_proven_before_the_clock_and_its_share_of_the_peak_is_known(
    harness: Callable[..., Run], engine: str
) -> None:
    run = harness(f"engine={engine}", "hardware=h100_80g", "dataset.num_samples=16", DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert run.row["dtype"] == "bfloat16"
    assert 0 < float(run.row["model_flops_utilisation"]) < 1
    proof = run.record["proof"]
    assert proof["layers"] is None and proof["largest_distance"] <= proof["bound"]
    statistics = run.record["engine_statistics"]
    if engine == "fastgen":
        assert statistics["device_busy_s"] + statistics["device_gap_s"] <= float(run.row["elapsed_s"])


def test_llama2_7b_with_made_up_weights_runs(harness: Callable[..., Run]) -> None:
    overrides = ["model=llama2_7b", "model.weights=dummy", "hardware=h100_80g", "generation.stop=length"]
    job = ["dataset=synthetic", "dataset.prompt=random", "dataset.num_samples=32"]
    run = harness("engine=ds_inference", *overrides, *job, DS_ACCELERATOR="cuda")
    assert run.status == 0, run.stderr
    assert (run.row["model"], run.row["completed"]) == ("llama2_7b", "32")
    assert int(run.row["output_tokens"]) == 32 * 64
