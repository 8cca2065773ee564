"""Blocks of the KV cache that prompts share: the pool, the scheduler over it, and a pass that is launched ahead."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.engines import settings
from support.late_device import VOCABULARY, LateDevice, alone, piece

from harness.basics.clock import Clock
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks, SharedKvBlocks, prefix_keys
from harness.engines.shared.order import Order
from harness.models.ends import Ends, StopStrings
from harness.models.tokenizer import ByteTokenizer
from harness.workload.records import Completion, PassRecord, Request

EOS = 7
Prompt = tuple[int, ...]


def next_token(tokens: list[int]) -> int:
    """A model for the tests: the next token is a function of all the tokens before it, 7 (EOS) now and then."""
    return hash(tuple(tokens)) % 11


def family(rng: random.Random, count: int, longest: int, stems: int = 3) -> list[Prompt]:
    """Returns prompts of which many begin alike: each is a beginning of one of a few stems, or goes on after one."""
    roots = [[rng.randrange(11) for _ in range(longest)] for _ in range(stems)]
    roots.append(roots[0][: longest // 2] + [rng.randrange(11) for _ in range(longest // 2)])
    found = []
    for _ in range(count):
        kept = rng.choice(roots)[: rng.randint(0, longest)]
        found.append(tuple(kept + [rng.randrange(11) for _ in range(rng.choice([0, 0, 1, 2, 9]))]) or (3,))
    return found


# --- the pool ---


def test_a_key_stands_for_all_tokens_up_to_its_blocks_end() -> None:
    prompt = list(range(100, 119))
    keys = prefix_keys(prompt, 4)
    assert len(keys) == len(set(keys)) == 4  # of 19 tokens the last three fill no block
    assert all(len(key) == 32 for key in keys)
    assert prefix_keys(prompt[:16], 4) == keys and prefix_keys(prompt[:15], 4) == keys[:3]
    for place in range(16):  # another token there, another key there and behind it
        other = prefix_keys([*prompt[:place], 5, *prompt[place + 1 :]], 4)
        assert [one == two for one, two in zip(keys, other, strict=True)] == [n < place // 4 for n in range(4)]
    assert prefix_keys([1] * 3, 4) == ()
    assert prefix_keys([0, 1], 1) != prefix_keys([1, 0], 1)
    assert KvBlocks(4, 4).keys(prompt) == () and SharedKvBlocks(4, 4).keys(prompt) == keys


def test_blocks_are_free_when_their_last_holder_is_gone_and_found_until_they_are_handed_out() -> None:
    pool = SharedKvBlocks(6, 2)
    keys = pool.keys([1, 2, 3, 4, 5, 6])
    mine = pool.take(4)
    assert mine == [0, 1, 2, 3]
    pool.publish(mine, keys, 0, 5)  # the third block is not full yet
    assert pool.find(keys) == [0, 1] and pool.find(pool.keys([1, 2, 9, 9])) == [0] and pool.find(keys[1:]) == [1]
    yours = pool.hold(pool.find(keys)) + pool.take(1)
    assert (yours, pool.used, pool.free, pool.peak) == ([0, 1, 4], 5, 1, 5)
    pool.publish(mine, keys, 5, 6)
    pool.publish(yours, keys, 4, 6)  # the same contents once more: the first is found, and this one has no key
    assert pool.find(keys) == [0, 1, 2]
    pool.give_back(mine)
    assert mine == [] and (pool.used, pool.free) == (3, 3)  # two of them are still yours
    assert pool.idle([0, 1, 2]) == 1
    pool.give_back(yours)
    assert (pool.used, pool.free, pool.idle([0, 1, 2])) == (0, 6, 3)
    assert pool.find(keys) == [0, 1, 2]
    # Blocks without contents first, then what has been free the longest, of a sequence's own the last first.
    assert pool.take(4) == [3, 4, 5, 2]
    assert pool.find(keys) == [0, 1]
    with pytest.raises(IndexError, match="3 blocks asked for, 2 free"):
        pool.take(3)
    assert pool.take(2) == [1, 0] and pool.find(keys) == [] and pool.free == 0


def test_without_sharing_the_lowest_free_block_is_handed_out_first() -> None:
    pool = KvBlocks(5, 2)
    first, second = pool.take(2), pool.take(2)
    pool.give_back(first)
    assert pool.find(pool.keys([1, 2, 3, 4])) == [] and pool.hold([]) == [] and pool.idle([]) == 0
    assert (pool.take(2), second) == ([0, 1], [2, 3])


# --- the scheduler ---


class Cache:
    """Remembers after which tokens each slot was computed, as keys and values depend on all of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], Prompt] = {}

    def forward(self, batch: RaggedBatch) -> list[int]:
        size = self.scheduler.blocks.block_size
        holders = Counter(block for sequence in self.scheduler.running for block in sequence.blocks)
        rows = []
        for sequence, start, length, _ in batch.chunks:
            tokens = sequence.tokens
            for position in range(start, start + length):
                block = sequence.blocks[position // size]
                assert holders[block] == 1, "a shared block is written"
                assert block not in published(self.scheduler.blocks), "a block that can be found is written"
                self.slots[block, position % size] = tuple(tokens[: position + 1])
        for sequence, start, length, last in batch.chunks:
            tokens = sequence.tokens
            for position in range(start + length):
                seen = self.slots[sequence.blocks[position // size], position % size]
                assert seen == tuple(tokens[: position + 1]), "keys and values of other tokens"
            assert last == (start + length == len(tokens))
            if last:
                rows.append(next_token(tokens))
        return rows


def published(pool: KvBlocks) -> set[int]:
    """Returns the blocks that can be found."""
    return set(pool._blocks.values()) if isinstance(pool, SharedKvBlocks) else set()


def check_pool(scheduler: Scheduler) -> None:
    """Compares the pool's books with what the running sequences hold."""
    pool = scheduler.blocks
    assert isinstance(pool, SharedKvBlocks)
    held = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert all(len(set(sequence.blocks)) == len(sequence.blocks) for sequence in scheduler.running)
    assert all(not sequence.blocks for sequence in scheduler.waiting)
    assert {block: count for block, count in enumerate(pool._holders) if count} == dict(held)
    free = [*pool._free, *pool._idle]
    assert sorted([*free, *held]) == list(range(pool.total)), "a block is lost, or both held and free"
    assert (pool.free, pool.used) == (len(free), len(held))
    assert {block: key for key, block in pool._blocks.items()} == {b: k for b, k in enumerate(pool._keys) if k}
    assert set(pool._idle) <= published(pool) and not published(pool) & set(pool._free)


def run(
    jobs: list[tuple[Prompt, int]], blocks: KvBlocks, budget: int, max_sequences: int, stop: bool
) -> tuple[dict[int, Sequence], Scheduler]:
    """Brings all jobs that fit to their ends."""
    scheduler = Scheduler(budget, max_sequences, blocks, Ends(frozenset([EOS])) if stop else Ends())
    cache, done = Cache(scheduler), {}
    for uid, (prompt, most) in enumerate(jobs):
        if scheduler.refusal(len(prompt), most) is None:
            scheduler.submit(Sequence(uid, list(prompt), len(prompt), most))
    fed = passes = 0
    while scheduler.unfinished:
        passes += 1
        assert passes < 20_000, "no progress"
        batch = scheduler.schedule()
        fed += batch.tokens
        assert 1 <= batch.tokens <= budget and len(scheduler.running) <= max_sequences
        if isinstance(blocks, SharedKvBlocks):
            check_pool(scheduler)
        for sequence in scheduler.complete(batch, cache.forward(batch)):
            assert sequence.uid not in done
            done[sequence.uid] = sequence
    once = sum(len(sequence.tokens) - 1 for sequence in done.values())
    assert fed == once + scheduler.recomputed_tokens - scheduler.shared_prompt_tokens
    assert scheduler.shared_prompt_tokens == sum(sequence.shared or 0 for sequence in done.values())
    assert all(0 <= (sequence.shared or 0) < sequence.prompt_len for sequence in done.values())
    assert min(scheduler.shared_prompt_tokens, scheduler.recomputed_tokens) >= 0
    assert blocks.used == 0 and blocks.free == blocks.total and blocks.peak <= blocks.total
    return done, scheduler


def test_sharing_changes_no_token_and_leaves_no_block_behind(scale: Callable[..., int]) -> None:
    seen = {"shared": 0, "preempted": 0, "found again": 0, "refused": 0, "eos": 0}

    @hypothesis_settings(max_examples=scale(300, 3000, 200), deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        max_sequences=st.integers(1, 8),
        extra_budget=st.integers(0, 30),
        block_size=st.integers(1, 9),
        total_blocks=st.integers(1, 60),
        stop=st.booleans(),
    )
    def check(seed: int, max_sequences: int, extra_budget: int, block_size: int, total_blocks: int, stop: bool) -> None:
        rng = random.Random(seed)
        prompts = family(rng, rng.randint(1, 25), rng.choice([6, 20, 40]))
        jobs = [(prompt, rng.randint(1, 20)) for prompt in prompts]
        budget = max_sequences + extra_budget
        plain, _ = run(jobs, KvBlocks(total_blocks, block_size), budget, max_sequences, stop)
        found, scheduler = run(jobs, SharedKvBlocks(total_blocks, block_size), budget, max_sequences, stop)
        assert found.keys() == plain.keys()
        for uid, sequence in found.items():
            assert sequence.tokens == plain[uid].tokens
            assert sequence.finish_reason == plain[uid].finish_reason
        thrown = [sequence for sequence in found.values() if len(sequence.tokens) > sequence.prompt_len]
        seen["shared"] += scheduler.shared_prompt_tokens > 0
        seen["preempted"] += scheduler.preemptions > 0
        seen["found again"] += scheduler.preemptions > 0 and scheduler.recomputed_tokens == 0
        seen["refused"] += len(found) < len(jobs)
        seen["eos"] += any(sequence.finish_reason == "eos" for sequence in thrown)

    check()
    assert all(seen.values()), seen


def chunks(batch: RaggedBatch) -> list[tuple[int, int, int]]:
    return [(sequence.uid, start, length) for sequence, start, length, _ in batch.chunks]


def passes_of(scheduler: Scheduler, prompts: list[Prompt], output: int = 1) -> Iterator[list[tuple[int, int, int]]]:
    for uid, prompt in enumerate(prompts):
        scheduler.submit(Sequence(uid, list(prompt), len(prompt), output))
    cache = Cache(scheduler)
    while scheduler.unfinished:
        batch = scheduler.schedule()
        yield chunks(batch)
        scheduler.complete(batch, cache.forward(batch))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    prompt = tuple(range(8))
    scheduler = Scheduler(64, 1, SharedKvBlocks(20, 4))  # one after another
    found = list(passes_of(scheduler, [prompt, prompt, (*prompt, 9), (*prompt[:7], 9), prompt[:4], prompt[:5]]))
    assert found == [[(0, 0, 8)], [(1, 4, 4)], [(2, 8, 1)], [(3, 4, 4)], [(4, 0, 4)], [(5, 4, 1)]]
    assert scheduler.shared_prompt_tokens == 4 + 8 + 4 + 0 + 4


def test_blocks_are_found_once_the_pass_that_fills_them_is_launched_and_not_before() -> None:
    prompt = tuple(range(10))
    scheduler = Scheduler(12, 4, SharedKvBlocks(20, 4))
    # The second joins while the first is computed: nothing of it is there. The third finds both blocks.
    found = list(passes_of(scheduler, [prompt, prompt, prompt]))
    assert found == [[(0, 0, 10), (1, 0, 2)], [(1, 2, 8), (2, 8, 2)]]
    ahead = Scheduler(12, 4, SharedKvBlocks(20, 4))
    for uid in range(3):
        ahead.submit(Sequence(uid, list(prompt), 10, 5))
    first = ahead.schedule()
    ahead.launched(first)  # and not collected
    second = ahead.schedule()
    assert chunks(second) == [(0, 10, 1), (1, 2, 8), (2, 8, 2)]
    assert second.chunks[2][0].blocks[:2] == second.chunks[0][0].blocks[:2]
    assert second.chunks[1][0].blocks[0] != second.chunks[0][0].blocks[0]  # it had begun with one of its own


def test_a_shared_block_counts_once_in_the_cache_and_lets_more_sequences_in() -> None:
    prompts = [(*range(16), 100 + uid, 5) for uid in range(4)]
    plain, shared = Scheduler(18, 4, KvBlocks(11, 4)), Scheduler(18, 4, SharedKvBlocks(11, 4))
    for scheduler in (plain, shared):
        for _ in passes_of(scheduler, prompts, output=3):
            pass
    assert (plain.peak_sequences, shared.peak_sequences) == (2, 4)
    assert (plain.blocks.peak, shared.blocks.peak) == (10, 5 + 1 + 1 + 1)
    assert shared.preemptions == 0


def test_what_is_preempted_finds_its_own_blocks_again_and_is_not_counted_as_shared() -> None:
    scheduler = Scheduler(16, 2, SharedKvBlocks(6, 2))
    found = list(passes_of(scheduler, [(1, 2, 3), (4, 5, 6, 8)], output=8))
    assert scheduler.preemptions == 1 and scheduler.shared_prompt_tokens == 0
    again = [start for step in found for uid, start, length in step if uid == 1 and length > 1]
    assert again == [0, 2]  # one of its two blocks had been handed out meanwhile
    fed = sum(length for step in found for _, _, length in step)
    assert fed == 3 + 4 + 7 + 7 + scheduler.recomputed_tokens


def test_more_is_submitted_where_what_waits_will_be_shared() -> None:
    prompt = tuple(range(40))
    for pool, hungry in ((KvBlocks(100, 4), False), (SharedKvBlocks(100, 4), True)):
        scheduler = Scheduler(40, 1, pool)
        for _ in passes_of(scheduler, [prompt]):
            pass
        for uid in range(3):
            scheduler.submit(Sequence(uid, list(prompt), 40, 5))
        assert scheduler.hungry(3) == hungry  # two passes of 40 tokens are 3 prompts whole, of which 4 tokens are left


# --- with a pass launched ahead ---


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests and what they run on; ``eos_at`` as of :class:`LateDevice`, ``strings`` are stop strings."""

    requests: list[Request]
    eos_at: dict[int, int]
    sizes: dict[str, int]
    block_size: int
    blocks: int
    lookahead: int
    strings: tuple[str, ...]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    rng = random.Random(draw(st.integers(0, 2**32)))
    sequences = draw(st.integers(1, 6))
    prompts = [tuple(3 + token for token in prompt) for prompt in family(rng, draw(st.integers(1, 18)), 30)]
    requests = [Request(n, "", rng.choice([1, 2, 3, 8, 15]), prompt_ids=prompt) for n, prompt in enumerate(prompts)]
    early = draw(st.booleans())
    return Load(
        requests,
        {one.index: rng.randrange(one.output_len or 1) for one in requests if early and rng.random() < 0.7},
        {"max_sequences": sequences, "token_budget": sequences + draw(st.sampled_from([0, 1, 4, 20]))},
        draw(st.integers(1, 6)),
        draw(st.integers(6, 40)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([(), (), ("abc",), ("bb", "cacc")])),
    )


def generated(load: Load, depth: int, sharing: bool) -> tuple[dict[int, Completion], FastGenEngine]:
    """Runs a workload to its end, and checks what must hold of its counts."""
    chosen = settings(order=Order.dataset, prefix_sharing=sharing, **load.sizes)
    engine: Any = FastGenEngine(dataclasses.replace(chosen, lookahead=load.lookahead))
    slots = load.sizes["max_sequences"]
    device = LateDevice(depth, load.block_size, load.blocks, slots, eos_at=load.eos_at, shared=sharing)
    engine.runner, engine.tokenizer, engine.total_blocks = device, ByteTokenizer(), load.blocks
    pieces = {token: piece(token).encode() for token in range(VOCABULARY)}
    strings = StopStrings(load.strings, pieces, max(map(len, load.strings))) if load.strings else None
    engine.ends = Ends(device.stop_ids(), strings=strings)
    passes: list[PassRecord] = []
    engine.on_pass = passes.append
    try:
        found = {completion.index: completion for completion in engine.generate(iter(load.requests), Clock())}
    finally:
        device.close()
    statistics = engine.statistics
    done = [one for one in found.values() if one.finish_reason != "rejected"]
    needed = sum(one.prompt_tokens + one.output_tokens - 1 for one in done)
    needed += statistics.recomputed_tokens + statistics.dropped_tokens - statistics.shared_prompt_tokens
    assert sum(record.tokens for record in passes) == needed
    assert statistics.shared_prompt_tokens == sum(one.shared_tokens or 0 for one in done)
    assert all((one.shared_tokens is not None) == sharing for one in done)
    assert sum(record.logit_rows or 0 for record in passes) == (
        sum(one.output_tokens for one in done) + statistics.dropped_tokens
    )
    return found, engine


def test_a_pass_ahead_reads_shared_blocks_that_the_one_before_it_fills(scale: Callable[..., int]) -> None:
    seen = {"shared": 0, "preempted": 0, "dropped": 0, "stop": 0}

    @hypothesis_settings(max_examples=scale(200, 2000, 120), deadline=None)
    @given(load=loads())
    def check(load: Load) -> None:
        answers = []
        for depth, sharing in ((0, False), (0, True), (1, True)):
            found, engine = generated(load, depth, sharing)
            answers.append({index: (one.finish_reason, one.token_ids, one.text) for index, one in found.items()})
        assert answers[0] == answers[1] == answers[2]
        for request in load.requests:
            reason, ids, _ = answers[2][request.index]
            if reason != "rejected":
                eos_at = load.eos_at.get(request.index)
                expected = alone(request.prompt_ids or (), request.output_len or 0, eos_at, load.strings)
                assert (ids, reason) == expected
        seen["shared"] += engine.statistics.shared_prompt_tokens or 0
        seen["preempted"] += engine.statistics.preemptions or 0
        seen["dropped"] += engine.statistics.dropped_tokens or 0
        seen["stop"] += sum(reason == "stop" for reason, *_ in answers[2].values())

    check()
    assert all(seen.values()), seen


def test_the_triton_plan_lists_a_shared_block_for_each_of_its_sequences() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    import torch

    from harness.engines.fastgen.runners.triton.plan import Limits, Planner

    planner = Planner(Limits(40, 8, 9, 16, width=6, group=3, vocab=1000, sharing=True), torch.device("cpu"))
    held = [[0, 1, 2, 3, 4 + uid] for uid in range(5)]
    sequences = [Sequence(uid, [5] * 70, 70, 9, blocks=held[uid], slot=uid) for uid in range(5)]
    batch = RaggedBatch([(sequence, 69, 1, True) for sequence in sequences], 5, 0, sequences)
    assert planner.pad(planner.plan(batch), 8).tokens == 8
    planner.send()
    found = {name: section.numpy() for name, section in planner.device.items()}
    for uid, row in enumerate(found["row"][:5]):
        assert found["blocks"][row : row + 5].tolist() == held[uid]
    assert found["blocks"][found["row"][5:8]].tolist() == [9] * 3  # padding has the scratch block
    assert found["slots"][:5].tolist() == [(4 + uid) * 16 + 5 for uid in range(5)]
