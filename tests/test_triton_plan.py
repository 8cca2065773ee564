"""What the Triton pass tells the device, number by number, against the scheduler's own lists; no kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.triton.graphs import FEW, Graphs, buckets, padded
from harness.engines.fastgen.runners.triton.plan import Limits, Plan, Planner
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.models.ends import Ends

CPU = torch.device("cpu")
VOCAB = 1000


def limits(tokens: int = 40, sequences: int = 8, blocks: int = 30, group: int = 3) -> Limits:
    return Limits(tokens, sequences, blocks, block_size=16, width=blocks, group=group, vocab=VOCAB)


def sent(planner: Planner) -> dict[str, Any]:
    planner.send()
    return {name: section.numpy() for name, section in planner.device.items()}


def check(planner: Planner, batch: RaggedBatch) -> Plan:
    """Compares what is sent with the batch."""
    plan, size = planner.plan(batch), planner.limits.block_size
    found, begin, outputs = sent(planner), 0, []
    tiles: dict[int, list[int]] = {number: [] for number in range(len(batch.chunks))}
    each = planner.limits.tile_tokens
    for chunk, first in zip(found["tile_chunk"][: plan.tiles], found["tile_first"][: plan.tiles], strict=True):
        tiles[chunk] += range(first, min(first + each, batch.chunks[chunk][2]))
    for chunk in found["singles"][: plan.singles]:
        tiles[chunk].append(0)
    for number, (sequence, start, length, last) in enumerate(batch.chunks):
        own, positions = slice(begin, begin + length), range(start, start + length)
        assert [found[name][number] for name in ("begin", "start", "length")] == [begin, start, length]
        assert found["sources"][own].tolist() == sequence.tokens[start : start + length]
        assert found["positions"][own].tolist() == list(positions)
        places = [sequence.blocks[place // size] * size + place % size for place in positions]
        assert found["slots"][own].tolist() == places
        held = -(-(start + length) // size)
        assert found["blocks"][found["row"][number] :][:held].tolist() == sequence.blocks[:held]
        assert tiles[number] == list(range(length))
        begin += length
        outputs += [begin - 1] if last else []
    assert found["outputs"][: plan.outputs].tolist() == outputs
    assert (plan.tokens, plan.chunks) == (begin, len(batch.chunks))
    assert found["blocks"][-1] == planner.limits.blocks and not found["zeros"].any()
    return plan


requests = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=14)


@settings(max_examples=60)
@given(requests, st.integers(4, 40), st.sampled_from([1, 3, 8, 71]), st.booleans())
def test_a_plan_is_the_schedulers_pass(jobs: list[tuple[int, int]], budget: int, group: int, ahead: bool) -> None:
    """With a cache so small that sequences are preempted; with ids that have come, or with places kept for them."""
    planner = Planner(limits(group=group, blocks=9), CPU)
    scheduler = Scheduler(budget, min(8, budget), KvBlocks(9, 16), Ends(frozenset({7})))
    for uid, (prompt, output) in enumerate(jobs):
        scheduler.submit(Sequence(uid, [(uid * 31 + place) % VOCAB for place in range(prompt)], prompt, output))
    launched: list[RaggedBatch] = []
    count = 0
    while scheduler.unfinished or launched:
        if scheduler.unfinished:
            batch = scheduler.schedule()
            check(planner, batch)
            scheduler.launched(batch)
            launched.append(batch)
        while len(launched) > (ahead and scheduler.unfinished > 0):
            oldest = launched.pop(0)
            count += 1
            scheduler.collect(oldest, [(count * 17 + row) % 40 for row in range(oldest.rows)])


def test_padding_uses_the_scratch_block() -> None:
    planner = Planner(limits(), CPU)
    chunks = [(Sequence(uid, [5] * 20, 20, 9, blocks=[uid, 9 - uid], slot=uid), 19, 1, True) for uid in range(3)]
    batch = RaggedBatch(chunks, 3, 0, [chunk[0] for chunk in chunks])
    plan = planner.plan(batch)
    assert plan.decodes
    assert planner.pad(plan, 8) == padded(8)
    found = sent(planner)
    assert found["slots"][:8].tolist() == [9 * 16 + 3, 8 * 16 + 3, 7 * 16 + 3, *[30 * 16] * 5]
    assert found["positions"][:8].tolist() == [19] * 3 + [0] * 5
    assert found["sources"][:8].tolist() == [5] * 3 + [0] * 5
    assert found["length"][:8].tolist() == [1] * 8 and found["start"][:8].tolist() == [19] * 3 + [0] * 5
    assert found["begin"][:8].tolist() == found["singles"][:8].tolist() == list(range(8))
    assert found["blocks"][found["row"][3:8]].tolist() == [30] * 5


def test_a_pass_of_decodes_is_not_taken_for_one_that_ends_prompts_within() -> None:
    planner = Planner(limits(), CPU)
    sequence = Sequence(0, [5] * 20, 20, 9, blocks=[0, 1], slot=0)
    assert not planner.plan(RaggedBatch([(sequence, 0, 1, False)], 0, 1, [sequence])).decodes
    assert not planner.plan(RaggedBatch([(sequence, 0, 20, True)], 0, 20, [sequence])).decodes


@pytest.mark.parametrize(
    ("tokens", "error", "line"),
    [
        ([5, VOCAB], IndexError, "token id 1000 is outside the model's vocabulary of 1000"),
        ([5, -1], IndexError, "token id -1 is outside the model's vocabulary of 1000"),
        ([5] * 41, ValueError, "a pass of 41 tokens and 1 sequences is above the limits of 40 and 8"),
    ],
    ids=["beyond", "no pass before", "too many"],
)
def test_what_no_device_may_see_is_refused(tokens: list[int], error: type[Exception], line: str) -> None:
    planner = Planner(limits(), CPU)
    sequence = Sequence(0, tokens, len(tokens), 1, blocks=[0, 1, 2], slot=0)
    with pytest.raises(error, match=f"^{line}$"):
        planner.plan(RaggedBatch([(sequence, 0, len(tokens), True)], 0, len(tokens), [sequence]))


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 64, 100, 128, 200, 256, 1000, 1024])
def test_each_pass_of_decodes_has_a_graph_of_about_its_size(most: int) -> None:
    rows = buckets(most)
    assert rows == sorted(set(rows)) and rows[-1] == most
    graphs = Graphs(lambda plan: None, lambda count: None, most, CPU)
    for count in range(1, most + 1):
        fitting = graphs.fitting(count)
        assert count <= fitting <= max(2 * count, count + 31)
        assert fitting in rows
    assert most > 128 or len(rows) <= len(FEW) + 9


def test_planning_is_quick_enough_for_the_host() -> None:
    """No Python a token: the calls do not grow with a prompt's length."""
    import cProfile

    counts = []
    for length in (50, 4000):
        planner = Planner(Limits(4096, 8, 400, 16, 400, 4, VOCAB), CPU)
        sequence = Sequence(0, [1] * length, length, 1, blocks=list(range(-(-length // 16))), slot=0)
        batch = RaggedBatch([(sequence, 0, length, True)], 0, length, [sequence])
        profile = cProfile.Profile()
        profile.runcall(planner.plan, batch)
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[0] == counts[1]
    assert np.all(planner._table[0, :250] == np.arange(250))
