"""Drafts that are looked up in a sequence's own tokens: plain Python first, then with real kernels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.engines import generate, hugging_face, settings
from support.machine import needs_native

from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.config import Drafts, Kernels
from harness.engines.fastgen.drafts import NGRAM, Drafter, Lookup
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks, SharedKvBlocks
from harness.engines.shared.order import Order
from harness.models.ends import Ends, StopStrings
from harness.workload.records import PassRecord, Request

EOS = 7


def next_token(tokens: list[int]) -> int:
    """A model that mostly goes on as after the same two tokens before, so that drafts hold often, and not always."""
    for place in range(len(tokens) - 2, 1, -1):
        if tokens[place - 2 : place] == tokens[-2:] and hash(tuple(tokens)) % 9:
            return tokens[place]
    return hash(tuple(tokens)) % 11


# --- what is drafted ---


def test_what_followed_the_newest_tokens_before_is_drafted() -> None:
    stem = list(range(10, 10 + NGRAM))
    tokens = [*stem, 1, 2, 3, 4, 5, *stem]
    assert Lookup().draft(tokens, 3) == [1, 2, 3]
    assert Lookup().draft(tokens[1:], 3) == []  # one token less is alike
    assert Lookup().draft(stem, 3) == [] and Lookup().draft(stem[1:], 3) == []
    # Of two places the last, and a sequel that reaches the end goes on from where it began.
    assert Lookup().draft([*tokens, 8, 9, *stem], 4) == [8, 9, *stem[:2]]
    assert Lookup().draft([5] * (NGRAM + 1), 3) == [5, 5, 5]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_looking_up_as_tokens_come_is_looking_through_all_of_them(
    tokens: list[int], most: int, data: st.DataObject
) -> None:
    lookup, end = Lookup(), 0
    while end < len(tokens):
        end = data.draw(st.integers(end + 1, len(tokens)))
        known = tokens[:end]
        places = [at for at in range(NGRAM, end) if known[at - NGRAM : at] == known[-NGRAM:]]
        expected: list[int] = []
        if places:
            longer = list(known)
            for _ in range(most):
                longer.append(longer[places[-1] + len(longer) - end])
            expected = longer[end:]
        assert lookup.draft(known, most) == expected


# --- the scheduler ---


class Cache:
    """Remembers after which tokens each slot was computed, as keys and values depend on all of them."""

    def __init__(self, blocks: KvBlocks) -> None:
        self.block_size = blocks.block_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def forward(self, batch: RaggedBatch) -> list[int]:
        """Returns the id after each token of a decode, and after the last of a prompt that ends in the pass."""
        given = []
        for number, (sequence, start, length, last) in enumerate(batch.chunks):
            tokens, size = sequence.tokens, self.block_size
            for place in range(start, start + length):
                self.slots[sequence.blocks[place // size], place % size] = tuple(tokens[: place + 1])
            for place in range(start + length):
                assert self.slots[sequence.blocks[place // size], place % size] == tuple(tokens[: place + 1])
            first = start if number < batch.decode_tokens else start + length - 1
            given += [next_token(tokens[: place + 1]) for place in range(first, start + length) if last]
        assert len(given) == batch.rows == len(batch.sampled)
        return given


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=15),
    sequences=st.integers(1, 6),
    extra=st.sampled_from([0, 1, 5, 30]),
    block_size=st.integers(1, 9),
    total_blocks=st.integers(4, 60),
    most=st.integers(1, 9),
    stop=st.sampled_from([Ends(), Ends(frozenset([EOS])), Ends(stop_ids=frozenset([3]))]),
    sharing=st.booleans(),
)
def test_every_request_ends_with_the_tokens_of_running_alone(
    jobs: list[tuple[int, int]],
    sequences: int,
    extra: int,
    block_size: int,
    total_blocks: int,
    most: int,
    stop: Ends,
    sharing: bool,
) -> None:
    blocks = (SharedKvBlocks if sharing else KvBlocks)(total_blocks, block_size)
    budget, drafter = sequences + extra, Drafter(most)
    scheduler, cache = Scheduler(budget, sequences, blocks, stop, drafter), Cache(blocks)
    submitted: dict[int, Sequence] = {}
    for uid, (prompt_len, output_len) in enumerate(jobs):
        prompt = [random.Random(uid).randrange(3) for _ in range(prompt_len)]
        if scheduler.refusal(prompt_len, output_len) is None:
            submitted[uid] = Sequence(uid, prompt, prompt_len, output_len)
            scheduler.submit(submitted[uid])
    fed = gave = finished = drafted = 0
    while scheduler.unfinished:
        before, free = [len(one.blocks) for one in scheduler.running], blocks.free
        batch = scheduler.schedule()
        room = budget - batch.decode_tokens
        assert batch.draft_tokens <= room // 2 and batch.tokens <= budget
        assert batch.tokens == sum(length for _, _, length, _ in batch.chunks)
        drafts = [length - 1 for _, _, length, _ in batch.chunks[: batch.decode_tokens]]
        assert sum(drafts) == batch.draft_tokens and max(drafts, default=0) <= most
        if scheduler.preempted == [] and len(batch.chunks) == batch.decode_tokens == len(before):
            assert free - blocks.free == len(batch.grown)  # a block for each that had to have one, and none for drafts
        unused = scheduler.unused_rows
        finished += len(scheduler.complete(batch, cache.forward(batch)))
        fed, drafted = fed + batch.tokens, drafted + batch.draft_tokens
        gave += batch.rows - (scheduler.unused_rows - unused)
    assert (finished, blocks.used) == (len(submitted), 0)
    for sequence in submitted.values():
        tokens, reason = sequence.tokens[: sequence.prompt_len], "length"
        while len(tokens) < sequence.most_tokens:
            tokens.append(next_token(tokens))
            if found := stop.reason(tokens, len(tokens) - 1):
                reason = found
                break
        assert (sequence.tokens, sequence.finish_reason) == (tokens, reason)
    outputs = sum(len(sequence.output_ids) for sequence in submitted.values())
    assert gave == outputs and drafted == drafter.drafted >= drafter.accepted
    once = sum(len(sequence.tokens) - 1 for sequence in submitted.values())
    wasted = drafter.drafted - drafter.accepted
    assert fed == once + wasted + scheduler.recomputed_tokens - scheduler.shared_prompt_tokens


# --- kernels ---


def repeating(count: int) -> list[Request]:
    """Returns prompts that say the same several times, and some that do not."""
    rng = random.Random(2)
    jobs = []
    for index in range(count):
        once = [rng.randrange(3, 300) for _ in range(rng.choice([1, 5, 12, 25]))]
        jobs.append(Request(index, "", rng.choice([1, 2, 7, 40]), prompt_ids=tuple(once * rng.choice([1, 3, 5]))))
    return jobs


def cut(outputs: dict[int, list[int]], jobs: list[Request], ends: Ends) -> dict[int, tuple[list[int], str]]:
    """Returns outputs as far as ``ends`` lets them come, and how they end."""
    found = {}
    for job in jobs:
        tokens, first = [*(job.prompt_ids or ()), *outputs[job.index]], len(job.prompt_ids or ())
        reasons = [(place, ends.reason(tokens, place)) for place in range(first, len(tokens))]
        place, reason = next((one for one in reasons if one[1]), (len(tokens) - 1, "length"))
        found[job.index] = (tokens[first : place + 1], reason or "length")
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kernels", [Kernels.torch, pytest.param(Kernels.native, marks=needs_native)])
@pytest.mark.parametrize(
    ("budget", "sequences", "blocks", "most", "sharing"),
    [(200, 8, 60, 4, False), (64, 1, 20, 9, False), (9, 8, 60, 3, True), (40, 12, 11, 4, False), (40, 12, 11, 4, True)],
    ids=str,
)
def test_ids_are_those_of_hugging_face(
    kernels: Kernels, budget: int, sequences: int, blocks: int, most: int, sharing: bool
) -> None:
    """Room for all drafts, one request at a time, room for few, a cache too small for all that run; ends within."""
    jobs = repeating(24)
    sizes = {"token_budget": budget, "max_sequences": sequences, "kv_block_size": 16, "prefix_sharing": sharing}
    drafts = {"draft": Drafts.lookup, "draft_len": most}
    memory = {"kv_memory": blocks * 2 * 3 * 2 * 16 * 16 * 4}
    engine = FastGenEngine(settings(kernels=kernels, order=Order.dataset, **sizes, **drafts, **memory))
    engine.load()
    engine.warm_up()
    whole = hugging_face(engine.settings.source, jobs)
    common = sorted(token for output in whole.values() for token in output[3:])[::7]
    pieces = {token: b"abc"[token % 3 : token % 3 + 1] for token in range(300)}
    passes: list[PassRecord] = []
    engine.on_pass = passes.append
    for ends in (Ends(), Ends(frozenset(common[:5])), Ends(strings=StopStrings(["aab", "cb"], pieces, 3))):
        engine.ends = ends
        passes.clear()
        found = {index: (one.token_ids, one.finish_reason) for index, one in generate(engine, jobs).items()}
        assert found == cut(whole, jobs, ends)
        statistics = engine.statistics
        drafted, accepted = statistics.draft_tokens or 0, statistics.accepted_draft_tokens or 0
        outputs = sum(len(tokens) for tokens, _ in found.values())
        assert drafted == sum(record.draft_tokens or 0 for record in passes)
        assert sum(record.logit_rows or 0 for record in passes) == outputs + drafted - accepted
        if ends == Ends():
            assert drafted > accepted > 0
            assert bool(statistics.preemptions) == (blocks == 11)
