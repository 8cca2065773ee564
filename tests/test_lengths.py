"""Lengths that are drawn or another file's, shared beginnings and shuffled files: what is asked of the model then."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import datasets
from support.datasets import NO_CAP, assert_valid, chat, refusal

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig, SyntheticPrompt
from harness.costs import lengths as costs
from harness.workload.lengths import Spread, fitted, parse, shuffled
from harness.workload.reading import read, resolve
from harness.workload.records import Workload

write = datasets.write

RANDOM = SyntheticPrompt.random


def made_up(**keys: Any) -> DatasetConfig:
    return DatasetConfig(**{"name": "synthetic", "num_samples": 40, "input_len": 20, "output_len": 8, **keys})


def words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def outputs(work: Workload) -> list[int | None]:
    return [request.output_len for request in work.requests]


def prompts(work: Workload) -> list[int | None]:
    return [request.claimed_prompt_len for request in work.requests]


# What is drawn


def draws(text: str, count: int, seed: int = 0) -> list[int]:
    spread = parse("dataset.output_len", text)
    assert isinstance(spread, Spread)
    return list(islice(spread.lengths(seed, "output_len"), count))


def test_uniform_lengths_reach_both_ends_and_no_further() -> None:
    found = draws("uniform:3:9", 2000)
    assert set(found) == set(range(3, 10))
    assert statistics.mean(found) == pytest.approx(6, abs=0.2)
    assert set(draws("uniform:5:5", 20)) == {5}


def test_lognormal_lengths_have_the_median_and_spread_that_were_asked_for() -> None:
    found = draws("lognormal:200:0.5", 4000)
    assert statistics.median(found) == pytest.approx(200, rel=0.05)
    assert statistics.stdev(map(math.log, found)) == pytest.approx(0.5, rel=0.05)
    assert set(draws("lognormal:7:0", 20)) == {7}
    extreme = draws("lognormal:1000:10", 4000)
    assert min(extreme) == 1 and max(extreme) == 1_000_000


def test_the_same_seed_draws_the_same_lengths_for_ever() -> None:
    # Written down, since a later version of Python or of this must not draw others for the same config.
    assert draws("uniform:1:1000", 6) == [49, 162, 763, 959, 287, 58]
    assert draws("lognormal:100:1", 6) == [118, 514, 216, 90, 65, 192]
    assert draws("uniform:1:1000", 6, seed=1) != draws("uniform:1:1000", 6)


def test_more_samples_begin_with_the_fewer_ones() -> None:
    few, many = (read(made_up(num_samples=n, input_len="uniform:5:90", output_len="lognormal:9:1")) for n in (10, 40))
    assert many.requests[:10] == few.requests
    assert len(set(prompts(many))) > 10 and len(set(outputs(many))) > 5
    # What is drawn for prompts is not what is drawn for outputs.
    same = read(made_up(input_len="uniform:5:90", output_len="uniform:5:90"))
    assert prompts(same) != outputs(same)


@pytest.mark.parametrize(
    "value",
    [
        *("uniform", "uniform:3", "uniform:9:3", "uniform:0:3", "uniform:1:1000001", "uniform:1:2:3", "uniform:a:b"),
        *("uniform:-1:3", "uniform:1.5:3", "uniform:1:9\n", "lognormal:5", "lognormal:0:1", "lognormal:5:-1"),
        *("lognormal:5:11", "lognormal:nan:1", "lognormal:5:nan", "lognormal:inf:1", "file:", "many", "", "5"),
    ],
)
def test_what_is_no_length_is_one_line(value: str) -> None:
    for key in ("input_len", "output_len"):
        with pytest.raises(UserError) as caught:
            read(made_up(**{key: value}))
        line = str(caught.value)
        assert line.startswith(f"dataset.{key}: ") and "is no length; give a whole number from 1 to 1,000,000" in line
        assert "uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or file:PATH" in line and "\n" not in line


@given(st.from_regex(r"(uniform|lognormal|file|x)?(:[-+_0-9a-z.\u0661 ]{0,7}){0,4}", fullmatch=True))
def test_any_text_draws_lengths_or_is_one_line(text: str) -> None:
    try:
        found = parse("dataset.output_len", text)
    except UserError as error:
        assert str(error).startswith("dataset.output_len: ") and "\n" not in str(error)
        return
    if isinstance(found, Spread):
        lengths = list(islice(found.lengths(0, "output_len"), 20))
        assert all(type(length) is int and 1 <= length <= min(found.most, 1_000_000) for length in lengths)


@pytest.mark.parametrize("value", [True, 5.0, [5]])
def test_a_length_is_no_other_type(value: Any) -> None:
    assert refusal("sharegpt", "x.json", output_len=value).startswith("dataset.output_len: ")


# Drawn lengths and the model's context


@given(
    prompt=st.integers(1, 5000),
    output=st.integers(1, 5000),
    drawn=st.sets(st.sampled_from(["input_len", "output_len"])),
    context=st.none() | st.integers(2, 4000),
)
def test_only_what_was_drawn_is_cut(prompt: int, output: int, drawn: set[str], context: int | None) -> None:
    new_prompt, new_output = fitted(prompt, output, drawn, context)
    assert 1 <= new_prompt <= prompt and 1 <= new_output <= output
    assert new_prompt == prompt or "input_len" in drawn
    assert new_output == output or "output_len" in drawn
    if context is None or prompt + output <= context:
        assert (new_prompt, new_output) == (prompt, output)
    elif drawn == {"input_len", "output_len"}:
        assert new_prompt + new_output == context
    elif "output_len" in drawn and prompt < context:
        assert new_output == context - prompt
    elif "input_len" in drawn and output < context:
        assert new_prompt == context - output


def test_drawn_lengths_stay_within_the_context_and_a_note_says_so() -> None:
    work = read(made_up(input_len="uniform:10:100", output_len="uniform:10:100", prompt=RANDOM))
    whole = resolve(work, NO_CAP, vocab_size=100)
    cut = resolve(work, NO_CAP, vocab_size=100, max_context=64)
    assert whole.notes == () and whole == resolve(work, NO_CAP, vocab_size=100, max_context=1000)
    lengths = [(len(one.prompt_ids or ()), one.output_len or 0) for one in cut.requests]
    assert all(prompt + output <= 64 for prompt, output in lengths)
    longer = sum((one.claimed_prompt_len or 0) + (one.output_len or 0) > 64 for one in work.requests)
    assert cut.notes == (f"{longer} of 40 drawn lengths were cut to the model's context of 64 tokens",)
    assert_valid(cut)
    assert resolve(cut, NO_CAP, vocab_size=100, max_context=64) == cut
    # What is planned with before anything is tokenized is the same.
    planned = costs.of(work.requests, 64)
    assert planned.rejected == 0 and [tuple(item) for item in planned.items] == lengths


def test_a_number_is_never_cut() -> None:
    work = read(made_up(input_len=60, output_len=8))
    assert resolve(work, NO_CAP, max_context=64).requests == work.requests
    assert costs.of(work.requests, 64).rejected == 40


def test_an_output_is_cut_to_what_its_text_leaves(write: Callable[..., str]) -> None:
    path = write([chat("one two three"), chat("one", "two")])
    work = read(DatasetConfig(name="sharegpt", path=path, output_len="uniform:50:50"))
    cut = resolve(work, GenerationConfig(max_output_len=45), count_tokens=words, max_context=41)
    assert outputs(cut) == [40] and outputs(resolve(work, GenerationConfig(max_output_len=30))) == [30]
    with pytest.raises(ValueError, match="count_tokens"):
        resolve(work, NO_CAP, max_context=41)


def test_a_text_is_as_long_as_its_cut_length() -> None:
    work = read(made_up(num_samples=1, input_len="uniform:50:50", output_len=10))
    [request] = resolve(work, NO_CAP, max_context=40).requests
    assert (request.prompt, request.claimed_prompt_len, request.output_len) == ("hi" * 29, 30, 10)


# Lengths of another file


def test_numbers_of_a_file_are_taken_in_turn(write: Callable[..., str]) -> None:
    path = write("3\n 5\n7\n", "lengths.txt")
    work = read(made_up(output_len=f"file:{path}"))
    assert outputs(work)[:7] == [3, 5, 7, 3, 5, 7, 3] and work.sha256 is not None
    other = read(made_up(output_len=f"file:{write('3 5 8', 'other.txt')}"))
    assert other.sha256 != work.sha256  # another file is another job
    assert prompts(read(made_up(input_len=f"file:{path}")))[:3] == [3, 5, 7]


def test_lengths_of_a_dataset_s_requests(write: Callable[..., str]) -> None:
    path = write([["a b c", 11, 4], ["d", 12, 6]])
    work = read(made_up(num_samples=3, input_len=f"file:{path}", output_len=f"file:{path}", prompt=RANDOM))
    assert (prompts(work), outputs(work)) == ([11, 12, 11], [4, 6, 4])
    drawn = [len(one.prompt_ids or ()) for one in resolve(work, NO_CAP, vocab_size=50).requests]
    assert drawn == [11, 12, 11]


def test_lengths_that_only_a_tokenizer_tells(write: Callable[..., str]) -> None:
    path = write([chat("a b c", "one two"), chat("d e", "one"), chat("f")])
    keys = {"input_len": f"file:{path}", "output_len": f"file:{path}"}
    work = read(made_up(num_samples=3, **keys, prompt=RANDOM, shared_prefix=5))
    resolved = resolve(work, NO_CAP, vocab_size=50, count_tokens=words)
    assert [len(one.prompt_ids or ()) for one in resolved.requests] == [8, 7, 8]
    assert outputs(resolved) == [2, 1, 2]
    assert_valid(resolved)
    assert "use dataset.prompt=random" in refusal("synthetic", num_samples=3, output_len=1, input_len=f"file:{path}")


def test_a_file_without_lengths_is_one_line(write: Callable[..., str]) -> None:
    for path, found in (
        (write([["a", 0, 1]]), "prompt_len: 0 is not a whole number"),
        (write("0 1", "zero.txt"), "0 is not a whole number from 1 to 1,000,000"),
        (write(b"\xff\xfe", "binary"), "neither a dataset whose format is known, nor bare numbers"),
        (write("two\nprompts", "prompts.txt"), "no request brings a length of its output, read as dataset=text"),
        ("/no/such/file", "no such file"),
    ):
        line = refusal("synthetic", num_samples=3, input_len=5, output_len=f"file:{path}")
        assert line.startswith("dataset.output_len"), line
        assert found in line


def test_a_length_for_a_format_that_brings_its_own_is_refused(write: Callable[..., str]) -> None:
    line = refusal("asc24", write([["a", 1, 1]]), output_len="uniform:1:5")
    assert line.startswith("dataset.output_len: uniform:1:5 given with dataset=asc24, which brings its own lengths")


# Shared beginnings


def test_prompts_begin_with_one_of_so_many_prefixes() -> None:
    plain, config = made_up(prompt=RANDOM), made_up(prompt=RANDOM, shared_prefix=16, prefixes=4)
    work = resolve(read(config), NO_CAP, vocab_size=1000)
    ids = [request.prompt_ids or () for request in work.requests]
    assert {len(one) for one in ids} == {36}
    assert [one[:16] for one in ids[:4]] == [one[:16] for one in ids[4:8]]
    assert len({one[:16] for one in ids}) == 4 and len({one[16:] for one in ids}) == 40
    # Their own ids are those of the same config without a prefix.
    assert [one[16:] for one in ids] == [
        one.prompt_ids for one in resolve(read(plain), NO_CAP, vocab_size=1000).requests
    ]
    assert resolve(read(config), NO_CAP, vocab_size=1000) == work


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"shared_prefix": 5}, "dataset.shared_prefix: 5 given with dataset.prompt=hi, which draws nothing"),
        ({"shared_prefix": -1, "prompt": RANDOM}, "dataset.shared_prefix: -1 is out of range"),
        ({"shared_prefix": 1_000_001, "prompt": RANDOM}, "dataset.shared_prefix: 1000001 is out of range"),
        ({"prefixes": 4, "prompt": RANDOM}, "dataset.prefixes: 4 beginnings without a length"),
        ({"prefixes": 0, "shared_prefix": 5, "prompt": RANDOM}, "dataset.prefixes: 0 is out of range"),
        ({"num_samples": 1000, "shared_prefix": 200_000, "prompt": RANDOM}, "dataset.num_samples: 1,000 prompts of"),
        ({"shuffle": True}, "dataset.shuffle: true given with dataset=synthetic, whose prompts are made up"),
        ({"chat_template": True}, "dataset.chat_template: true given with dataset=synthetic, whose prompts are made"),
    ],
)
def test_what_made_up_prompts_cannot_be(keys: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError) as caught:
        read(made_up(**keys))
    assert str(caught.value).startswith(found)


def test_prompts_of_a_file_share_what_they_share() -> None:
    line = refusal("sample", shared_prefix=5)
    assert line.startswith("dataset.shared_prefix: 5 given with dataset=sample, which brings its own prompts")


# Shuffled files


def test_a_shuffled_file_is_the_same_each_time_and_taken_from_afterwards() -> None:
    whole = [request.prompt for request in read(DatasetConfig(name="sample")).requests]
    config = {"name": "sample", "shuffle": True}
    mixed = [request.prompt for request in read(DatasetConfig(**config)).requests]
    assert mixed != whole and sorted(mixed) == sorted(whole)
    first = read(DatasetConfig(**config, num_samples=10))
    assert [request.prompt for request in first.requests] == mixed[:10]
    assert [request.index for request in first.requests] == list(range(10))
    assert [request.prompt for request in read(DatasetConfig(**config, seed=1)).requests] not in (mixed, whole)
    assert read(DatasetConfig(**config)).sha256 == read(DatasetConfig(name="sample")).sha256


def test_shuffling_depends_on_the_seed_and_the_number_alone() -> None:
    assert shuffled(list(range(10)), 0) == [6, 5, 1, 7, 4, 8, 2, 9, 3, 0]
    assert shuffled([], 0) == [] and shuffled(["a"], 5) == ["a"]
