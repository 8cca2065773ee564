"""Greedy ids in fp32 equal Hugging Face's, request by request, whatever the passes look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import answers
from support.machine import kernels_on_cpu
from support.runs import SAMPLE, Run

from harness.machine.device import cpu_flags, supports_bfloat16_on_cpu

# KV blocks of 16 tokens in fp32 are 16 * 46,080 bytes; the longest request of the sample needs 1,063 slots: 67 blocks.
TIGHT = 80 * 16 * 46_080

TORCH = ["engine.kernels=torch"]  # where nothing is said: the native kernels, if the machine has AVX2
# Requests: what differs between engines and ranks shows in the first few, if at all.
SOME, FEWER, FEW, ALL = 24, 12, 8, 72


def slow(*values: Any) -> Any:
    """Returns a case that is left to ``--all``."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.endurance
def test_the_ids_to_compare_with_are_what_hugging_face_computes(
    demo_model: Path, scale: Callable[[int, int], int]
) -> None:
    known = answers.kept(demo_model)
    assert known is not None, f"{answers.KEPT} is of another model or sample: tests/support/answers.py writes it anew"
    if scale(0, 1):
        assert answers.computed(demo_model, ALL) == known
    else:
        some = {index: known[index] for index in range(SOME)}
        assert answers.followed(demo_model, some) == some


@pytest.mark.slow
@pytest.mark.endurance
def test_the_sample_in_fp32(
    harness: Callable[..., Run],
    reference: dict[int, list[int]],
    demo_model: Path,
    scale: Callable[[int, int], int],
) -> None:
    assert len(reference) == scale(SOME, ALL)
    passes = ["engine.token_budget=48", "engine.max_sequences=8", "engine.order=dataset"]
    run = harness(
        "engine=fastgen", *passes, "parallel.dp=2", "model.dtype=float32", f"dataset.num_samples={len(reference)}"
    )
    assert run.status == 0, run.stderr
    assert (run.row["status"], run.row["kernels"]) == ("ok", kernels_on_cpu(demo_model, "float32"))
    assert run.token_ids == reference
    assert int(run.row["output_tokens"]) == sum(len(ids) for ids in reference.values())


@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        slow(SOME, ["engine=fastgen"]),
        slow(FEWER, ["engine=fastgen", *TORCH, "engine.token_budget=48", "engine.max_sequences=16"]),
        slow(
            SOME, ["engine=fastgen", "engine.token_budget=96", "engine.kv_block_size=16", f"engine.kv_memory={TIGHT}"]
        ),
        slow(FEWER, ["engine=ds_inference", "parallel.dp=2"]),
        slow(FEW, ["engine=baseline", "parallel.dp=2"]),
        # 9 query and 3 key-value heads: AutoTP gives two ranks 2 and 1 of the latter, three ranks one each.
        slow(FEW, ["engine=fastgen", *TORCH, "parallel=tp2", "engine.token_budget=48", "engine.max_sequences=16"]),
        slow(4, ["engine=fastgen", *TORCH, "parallel.tp=3"]),
        slow(4, ["engine=fastgen", "parallel.tp=2", "parallel.dp=2"]),
        slow(FEW, ["engine=ds_inference", "parallel.tp=2", "engine.batch_size=5"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_engines_and_ranks_in_fp32(
    harness: Callable[..., Run],
    reference: dict[int, list[int]],
    demo_model: Path,
    count: int,
    overrides: list[str],
) -> None:
    """No request of these is at a near-tie: whatever the order of summation, all ids are the same."""
    run = harness(*overrides, "model.dtype=float32", f"dataset.num_samples={count}")
    assert run.status == 0, run.stderr
    assert run.token_ids == {index: reference[index] for index in range(count)}
    tp = 3 if "parallel.tp=3" in overrides else 2 if {"parallel=tp2", "parallel.tp=2"} & set(overrides) else 1
    assert int(run.row["tp"]) == tp
    if "engine=fastgen" in overrides:
        auto = tp == 1 and TORCH[0] not in overrides
        assert run.row["kernels"] == (kernels_on_cpu(demo_model, "float32") if auto else "torch")
    assert int(run.row["dp"]) == (2 if "parallel.dp=2" in overrides else 1)
    assert (int(run.row["preemptions"] or 0) > 0) == (f"engine.kv_memory={TIGHT}" in overrides)


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.parametrize("overrides", [[], TORCH], ids=["auto", "torch"])
def test_sample_in_bfloat16_differs_from_float32_by_rounding_only(
    harness: Callable[..., Run],
    reference: dict[int, list[int]],
    demo_model: Path,
    overrides: list[str],
    scale: Callable[[int, int], int],
) -> None:
    """Every token chosen in bf16 is, fp32 teacher-forced over the same ids, the best or all but the best.

    Hugging Face's own bf16 ``generate`` measured so on the same prompts: mean gap 0.0007, largest 0.24, with
    avx512_bf16; where the processor has no bf16 instructions, mean 0.0014 over the first 24 prompts. The bound is twice
    that. With AMX, which sums in another order, it is not known: PyTorch's kernels measured 0.0016 there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not overrides and kernels_on_cpu(demo_model, "bfloat16") == "torch":
        pytest.skip("auto takes PyTorch's kernels here, which are the other case")
    count = scale(SOME, ALL)
    run = harness("engine=fastgen", "model.dtype=bfloat16", *overrides, f"dataset.num_samples={count}")
    assert run.status == 0, run.stderr
    assert run.row["kernels"] == ("torch" if overrides else kernels_on_cpu(demo_model, "bfloat16"))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompts = [json.loads(line)["prompt"] for line in SAMPLE.read_text().splitlines()]
    gaps = []
    for index, ids in run.token_ids.items():
        if ids == reference[index]:  # what float32 chooses itself
            gaps.append(torch.zeros(len(ids)))
            continue
        prompt = tokenizer(prompts[index]).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids[:-1]]), logits_to_keep=len(ids)).logits[0]
        gaps.append(logits.amax(-1) - logits[torch.arange(len(ids)), torch.tensor(ids)])
    gap = torch.cat(gaps)
    assert len(gap) == int(run.row["output_tokens"]) > scale(600, 3000)
    assert gap.max() < 0.4
    known = supports_bfloat16_on_cpu() and "amx_bf16" not in cpu_flags()
    assert gap.mean() < (0.0014 if known else 0.0028)
