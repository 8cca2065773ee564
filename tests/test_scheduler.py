"""The scheduler and its blocks: plain Python, so every rule can be tried on thousands of random job lists."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.models.ends import Ends

EOS = 7


def next_token(tokens: list[int]) -> int:
    """A model for the tests: the next token is a function of all the tokens before it, 7 (EOS) now and then."""
    return hash(tuple(tokens)) % 11


def expected(prompt: list[int], max_new_tokens: int, stop: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        tokens.append(next_token(tokens))
        if stop and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class Cache:
    """Remembers which token each cache slot holds, as a runner would, and refuses to compute from wrong contents."""

    def __init__(self, blocks: KvBlocks) -> None:
        self.block_size = blocks.block_size
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}

    def forward(self, batch: RaggedBatch) -> list[int]:
        rows = []
        for sequence, start, length, last in batch.chunks:
            for position in range(start, start + length):
                slot = (sequence.blocks[position // self.block_size], position % self.block_size)
                self.slots[slot] = (sequence.uid, sequence.tokens[position])
            seen = []
            for position in range(start + length):
                slot = (sequence.blocks[position // self.block_size], position % self.block_size)
                uid, token = self.slots[slot]
                assert uid == sequence.uid, "another sequence's keys and values"
                seen.append(token)
            assert seen == sequence.tokens[: start + length]
            assert last == (start + length == len(sequence.tokens))
            if last:
                rows.append(next_token(seen))
        return rows


job_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=25)


@settings(max_examples=300, deadline=None)
@given(
    jobs=job_lists,
    max_sequences=st.integers(1, 8),
    extra_budget=st.integers(0, 30),
    block_size=st.integers(1, 9),
    total_blocks=st.integers(1, 60),
    stop=st.booleans(),
)
def test_every_request_ends_with_the_tokens_of_running_alone(
    jobs: list[tuple[int, int]],
    max_sequences: int,
    extra_budget: int,
    block_size: int,
    total_blocks: int,
    stop: bool,
) -> None:
    blocks = KvBlocks(total_blocks, block_size)
    budget = max_sequences + extra_budget
    scheduler = Scheduler(budget, max_sequences, blocks, Ends(frozenset([EOS])) if stop else Ends())
    cache = Cache(blocks)
    prompts = {}
    for uid, (prompt_len, max_new_tokens) in enumerate(jobs):
        prompt = [random.Random(uid).randrange(11) for _ in range(prompt_len)]
        fits = -(-(prompt_len + max_new_tokens - 1) // block_size) <= total_blocks
        assert (scheduler.refusal(prompt_len, max_new_tokens) is None) == fits
        if fits:
            prompts[uid] = (prompt, max_new_tokens)
            scheduler.submit(Sequence(uid, list(prompt), prompt_len, max_new_tokens))
    done: dict[int, Sequence] = {}
    fed = 0
    passes = 0
    while scheduler.unfinished:
        passes += 1
        assert passes < 20_000, "no progress"
        running_before = {sequence.uid for sequence in scheduler.running}
        batch = scheduler.schedule()
        fed += batch.tokens
        assert 1 <= batch.tokens <= budget
        assert batch.tokens == sum(length for _, _, length, _ in batch.chunks)
        assert all(length == 1 for _, _, length, _ in batch.chunks[: batch.decode_tokens])
        assert len(scheduler.running) <= max_sequences
        in_pass = Counter(sequence.uid for sequence, *_ in batch.chunks)
        assert max(in_pass.values()) == 1
        # Decodes first: each running sequence that has its prompt behind it, and was not preempted, is in the pass.
        for sequence in scheduler.running:
            if sequence.uid in running_before and sequence.computed >= sequence.prompt_len:
                assert sequence.uid in in_pass
        held = [block for sequence in scheduler.running for block in sequence.blocks]
        assert len(held) == len(set(held)) == blocks.used
        assert all(not sequence.blocks for sequence in scheduler.waiting)
        for sequence in scheduler.complete(batch, cache.forward(batch)):
            assert sequence.uid not in done
            done[sequence.uid] = sequence
    assert done.keys() == prompts.keys()
    assert blocks.used == 0
    for uid, (prompt, max_new_tokens) in prompts.items():
        output = expected(prompt, max_new_tokens, stop)
        assert done[uid].output_ids == output
        assert done[uid].finish_reason == ("eos" if stop and output[-1] == EOS else "length")
    once = sum(len(sequence.tokens) - 1 for sequence in done.values())
    assert fed == once + scheduler.recomputed_tokens


def test_prompts_are_split_and_composed_to_fill_each_pass() -> None:
    scheduler = Scheduler(10, 4, KvBlocks(100, 4))
    for uid, length in enumerate((25, 3, 3)):
        scheduler.submit(Sequence(uid, [1] * length, length, 5))
    shapes = []
    for _ in range(4):
        batch = scheduler.schedule()
        shapes.append([(sequence.uid, *what) for sequence, *what in batch.chunks])
        scheduler.complete(batch, [1] * batch.rows)
    assert shapes[0] == [(0, 0, 10, False)]
    assert shapes[1] == [(0, 10, 10, False)]
    assert shapes[2] == [(0, 20, 5, True), (1, 0, 3, True), (2, 0, 2, False)]
    assert shapes[3] == [(0, 25, 1, True), (1, 3, 1, True), (2, 2, 1, True)]


def test_preemption_takes_the_youngest_and_keeps_its_tokens() -> None:
    blocks = KvBlocks(4, 2)
    scheduler = Scheduler(8, 2, blocks)
    scheduler.submit(Sequence(0, [1, 2, 3], 3, 4))
    scheduler.submit(Sequence(1, [4], 1, 6))
    order = []
    while scheduler.unfinished:
        batch = scheduler.schedule()
        order += [(sequence.uid, list(sequence.tokens)) for sequence in scheduler.preempted]
        scheduler.complete(batch, [9] * batch.rows)
    assert scheduler.preemptions == len(order) >= 1
    assert {uid for uid, _ in order} == {1}
    assert order[0][1][:2] == [4, 9]


def test_a_request_that_fits_exactly_is_taken_and_one_token_more_is_refused() -> None:
    scheduler = Scheduler(8, 2, KvBlocks(3, 4))  # 12 slots; the last token generated needs none
    assert scheduler.refusal(8, 5) is None
    reason = scheduler.refusal(8, 6)
    assert reason is not None and "needs 4 KV blocks" in reason and "has 3" in reason
    with pytest.raises(ValueError):
        scheduler.submit(Sequence(0, [1] * 8, 8, 6))


def test_a_wrong_number_of_tokens_is_noticed() -> None:
    scheduler = Scheduler(8, 2, KvBlocks(3, 4))
    scheduler.submit(Sequence(0, [1, 2], 2, 3))
    batch = scheduler.schedule()
    with pytest.raises(ValueError):
        scheduler.complete(batch, [1, 2])


def test_the_next_pass_is_scheduled_before_ids_have_come() -> None:
    blocks = KvBlocks(8, 2)
    scheduler = Scheduler(8, 2, blocks, Ends(frozenset([EOS])))
    one, two, three = (Sequence(uid, [1, 2, 3], 3, most) for uid, most in enumerate((9, 2, 9)))
    for sequence in (one, two, three):
        scheduler.submit(sequence)
    first = scheduler.schedule()
    assert [(sequence.uid, sequence.slot) for sequence in first.grown] == [(0, 0), (1, 1)]
    scheduler.launched(first)
    assert (one.tokens, two.tokens) == ([1, 2, 3, -1], [1, 2, 3, -2])
    second = scheduler.schedule()
    assert [chunk[1:] for chunk in second.chunks] == [(3, 1, True), (3, 1, True)]
    assert second.grown == []
    scheduler.launched(second)
    assert (two.slot, two.blocks, scheduler.running) == (-1, [], [one])  # its last token is on its way
    assert scheduler.collect(first, [4, 5]) == []
    third = scheduler.schedule()
    assert [(sequence.uid, sequence.slot) for sequence in third.grown] == [(0, 0), (2, 1)]
    scheduler.launched(third)
    assert scheduler.collect(second, [EOS, 6]) == [one, two]
    assert (one.output_ids, one.finish_reason, one.blocks) == ([4, EOS], "eos", [])
    assert (two.output_ids, two.finish_reason) == ([5, 6], "length")
    assert scheduler.collect(third, [8, 9]) == []
    assert (scheduler.dropped_tokens, one.output_ids) == (1, [4, EOS])
    assert (scheduler.running, blocks.used) == ([three], len(three.blocks))


def test_a_sequence_preempted_before_its_end_was_known_does_not_come_back() -> None:
    blocks = KvBlocks(4, 2)
    scheduler = Scheduler(8, 2, blocks, Ends(frozenset([EOS])))
    old, young = Sequence(0, [1, 2, 3], 3, 5), Sequence(1, [1, 2], 2, 5)
    scheduler.submit(old)
    scheduler.submit(young)
    for _ in range(2):
        batch = scheduler.schedule()
        scheduler.launched(batch)
        if len(young.tokens) == 3:
            scheduler.collect(batch, [4, 4])
    ahead = scheduler.schedule()
    assert scheduler.preempted == list(scheduler.waiting) == [young]
    assert (scheduler.preemptions, scheduler.recomputed_tokens) == (1, 3)
    scheduler.launched(ahead)
    assert scheduler.collect(batch, [5, EOS]) == [young]
    assert (young.output_ids, young.finish_reason) == ([4, EOS], "eos")
    assert (list(scheduler.waiting), scheduler.running) == ([], [old])
    assert (scheduler.preemptions, scheduler.recomputed_tokens, scheduler.dropped_tokens) == (0, 0, 0)


def test_slots_are_given_lowest_first_and_come_back() -> None:
    scheduler = Scheduler(64, 4, KvBlocks(100, 4))
    for uid in range(6):
        scheduler.submit(Sequence(uid, [1] * 5, 5, 2 if uid in (1, 2) else 9))
    slots = []
    for _ in range(3):
        batch = scheduler.schedule()
        slots.append({sequence.uid: sequence.slot for sequence, *_ in batch.chunks})
        scheduler.complete(batch, [1] * batch.rows)
    assert slots == [{0: 0, 1: 1, 2: 2, 3: 3}] * 2 + [{0: 0, 3: 3, 4: 1, 5: 2}]


def test_max_sequences_above_the_token_budget_is_refused() -> None:
    with pytest.raises(ValueError):
        Scheduler(4, 5, KvBlocks(1, 1))


def test_blocks_are_given_lowest_first_and_never_twice() -> None:
    blocks = KvBlocks(5, 8)
    first = blocks.take(3)
    second = blocks.take(1)
    assert (first, second) == ([0, 1, 2], [3])
    blocks.give_back(first)
    assert first == []
    assert blocks.take(2) == [0, 1]
    assert (blocks.used, blocks.free, blocks.peak) == (3, 2, 4)
    with pytest.raises(IndexError):
        blocks.take(3)
    assert blocks.free == 2
    assert [blocks.needed(n) for n in (1, 8, 9)] == [1, 1, 2]
