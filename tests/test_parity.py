"""Greedy ids in fp32 equal Hugging Face's, request by request, whatever the passes look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Run

# KV blocks of 16 tokens in fp32 are 16 * 46,080 bytes; the longest request of the sample needs 1,063 slots: 67 blocks.
TIGHT = 80 * 16 * 46_080


@pytest.mark.parametrize(
    ("overrides", "preempts"),
    [
        pytest.param(["engine=fastgen"], False, id="fastgen"),
        pytest.param(
            ["engine=fastgen", "engine.token_budget=48", "engine.max_sequences=32", "engine.order=dataset"],
            False,
            id="fastgen-small-budget",
        ),
        pytest.param(
            [
                "engine=fastgen",
                "engine.token_budget=96",
                "engine.kv_block_size=16",
                f"engine.kv_memory={TIGHT}",
            ],
            True,
            id="fastgen-tiny-cache",
        ),
        pytest.param(["engine=baseline"], False, id="baseline"),
    ],
)
def test_sample_in_fp32(
    harness: Callable[..., Run], reference: dict[int, list[int]], overrides: list[str], preempts: bool
) -> None:
    run = harness(*overrides, "model.dtype=float32")
    assert run.status == 0, run.stderr
    assert run.row["status"] == "ok"
    assert run.token_ids == reference
    assert (int(run.row["preemptions"]) > 0) == preempts
    assert int(run.row["output_tokens"]) == sum(len(ids) for ids in reference.values())
