"""Thousands of malformed datasets: one line, or exactly the requests that an independent reading of the file finds."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.malformed import (
    FILE_LIMIT,
    LENGTH,
    LONGEST,
    SOUND,
    Malformed,
    Pairs,
    assert_one_line,
    damaged,
    is_length,
    is_text,
    mutate,
    squeezed,
    text_of,
    values_of,
    written,
)
from support.patience import no_hang

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig
from harness.workload import stored_file
from harness.workload.reading import read, resolve

NAMES = ("asc24", "sharegpt", "sample")


# What the file says, read without the harness.


class Expected(NamedTuple):
    """One request: its length is None where it is that of the reply."""

    prompt: str
    claimed: int | None
    output_len: int | None
    reply: str | None


def triple(value: Any, objects: bool) -> Expected:
    if objects and isinstance(value, dict):
        value = [value.get("prompt"), value.get("prompt_len"), value.get("output_len")]
    if not isinstance(value, list) or len(value) != 3:
        raise Malformed
    prompt, claimed, output_len = value
    if not is_text(prompt) or prompt == "" or not is_length(claimed) or not is_length(output_len):
        raise Malformed
    return Expected(prompt, claimed, output_len, None)


def conversation(value: Any, output_len: int | None) -> Expected | None:
    """Returns the first two turns; None for a conversation that has no prompt and reply, which is passed over."""
    if not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
        raise Malformed
    turns = value["conversations"][:2]
    if len(turns) < 2:
        return None
    if not all(isinstance(turn, dict) and is_text(turn.get("value")) for turn in turns):
        raise Malformed
    prompt, reply = (turn["value"] for turn in turns)
    return Expected(prompt, None, output_len, reply) if prompt and (reply or output_len) else None


def reading(data: bytes, name: str, num_samples: int | None, output_len: int | None) -> list[Expected]:
    """Returns the requests that the file holds; raises Malformed for one that must be refused."""
    records = values_of(text_of(data), many=name == "sample", either=name == "sharegpt")
    found: list[Expected] = []
    for record in records:
        one = conversation(record, output_len) if name == "sharegpt" else triple(record, name == "sample")
        if one is not None:
            found.append(one)
    if len(found) < (num_samples or 1):
        raise Malformed
    found = found[:num_samples]
    counted = [one if one.output_len else one._replace(output_len=words(one.reply)) for one in found]
    if not any(one.output_len for one in counted):
        raise Malformed
    return [one for one in counted if one.output_len]


def words(text: str | None) -> int:
    """Counts tokens, for replies."""
    return len((text or "").split())


# Files, from sound to senseless.


# Files, from sound to senseless.


@st.composite
def records(draw: st.DrawFn, name: str) -> Any:
    """Draws one sound record."""
    if name == "sharegpt":
        turns = [
            Pairs([("from", draw(st.sampled_from(["human", "gpt", "system"]))), ("value", draw(SOUND))])
            for _ in range(draw(st.sampled_from([2, 2, 2, 3, 1, 0])))
        ]
        return Pairs([("id", draw(SOUND)), ("conversations", turns)])
    fields = [draw(SOUND), draw(LENGTH), draw(LENGTH)]
    return fields if name == "asc24" else Pairs(zip(("prompt", "prompt_len", "output_len"), fields, strict=True))


@st.composite
def datasets(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draws the name of a reader, and the bytes of a file for it."""
    name = draw(st.sampled_from(NAMES))
    if draw(st.integers(0, 24)) == 0:
        return name, draw(st.binary(max_size=200))
    shape = name if draw(st.integers(0, 19)) else draw(st.sampled_from(NAMES))
    tree = [draw(records(shape)) for _ in range(draw(st.integers(0 if draw(st.integers(0, 19)) == 0 else 1, 4)))]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3]))):
        mutate(draw, tree)
    comma = draw(st.sampled_from([", "] * 60 + [",", ",,", ",\n", ";", "\u00a0,", " "]))
    lines = name == "sample" if draw(st.integers(0, 9)) else draw(st.booleans())
    text = "\n".join(written(one, comma) for one in tree) if lines else written(tree, comma)
    before = draw(
        st.sampled_from([""] * 60 + ["\ufeff", "\ufeff\ufeff", "\x00", " \r\n\t", ")]}'\n", "\u2028", "[", "\x0c"])
    )
    after = draw(
        st.sampled_from([""] * 60 + ["\n", "\x00", "\x1a", "]", " [1]", "\n\n{}", ",", "\u00a0", "//", "\x0b"])
    )
    encoding = draw(st.sampled_from(["utf-8"] * 60 + ["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7", "cp037"]))
    data = (before + text + after).encode(encoding, "surrogatepass" if encoding == "utf-8" else "ignore")
    if draw(st.integers(0, 5)) == 0:
        data = damaged(draw, data)
    if draw(st.integers(0, 4)) == 0:
        data = squeezed(draw, data)
        if draw(st.integers(0, 4)) == 0:
            data = damaged(draw, data)
    return name, data


@pytest.mark.endurance
def test_every_malformed_dataset_is_one_line(
    tmp_path: Path,
    scale: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "data.json"
    tally: collections.Counter[str] = collections.Counter()
    monkeypatch.setattr(stored_file, "MAX_FILE_BYTES", FILE_LIMIT)
    monkeypatch.setattr("harness.workload.formats.sample.SAMPLE_PATH", file)

    @hypothesis_settings(max_examples=scale(1_300, 26_000, 500), database=None, suppress_health_check=list(HealthCheck))
    @given(
        named=datasets(),
        num_samples=st.sampled_from([None] * 8 + [1, 2, 5]),
        output_len=st.sampled_from([None, None, 7]),
        cap=st.sampled_from([None, None, 3]),
    )
    def fuzz(named: tuple[str, bytes], num_samples: int | None, output_len: int | None, cap: int | None) -> None:
        name, data = named
        output_len = output_len if name == "sharegpt" else None
        file.write_bytes(data)
        try:
            expected = reading(data, name, num_samples, output_len)
        except Malformed:
            expected = []
        dataset = DatasetConfig(name, None if name == "sample" else str(file), num_samples, output_len=output_len)
        try:
            with no_hang():
                loaded = read(dataset)
                generation = GenerationConfig(max_output_len=cap)
                loaded = resolve(loaded, generation, count_tokens=lambda texts: list(map(words, texts)))
        except UserError as error:
            assert not expected, f"refused, though sound: {error}"
            assert_one_line(error)
            assert error.field.startswith(("dataset.path", "dataset.num_samples", "dataset=sample")), error.field
            tally[f"{name}, refused"] += 1
            return
        assert expected, "accepted, though malformed"
        tally[f"{name}, accepted"] += 1
        for index, (request, one) in enumerate(zip(loaded.requests, expected, strict=True)):
            assert (request.index, request.prompt, request.prompt_ids) == (index, one.prompt, None)
            assert request.claimed_prompt_len == one.claimed
            assert one.output_len is not None
            assert request.output_len == min(one.output_len, cap or one.output_len)
            assert type(request.output_len) is int and 1 <= request.output_len <= LONGEST

    started = time.perf_counter()
    fuzz()
    refused = sum(count for outcome, count in tally.items() if outcome.endswith("refused"))
    with capsys.disabled():
        seconds = time.perf_counter() - started
        print(f"\n{tally.total():,} datasets in {seconds:.0f} s, {refused:,} malformed and refused: {dict(tally)}")
    assert refused >= scale(1_000, 20_000, 350)
    # What is drawn hangs on the modules that are loaded (Hypothesis takes constants from them): a few may have few.
    part = scale(50, 50, 100)
    assert all(
        tally[f"{name}, {outcome}"] > tally.total() / part for name in NAMES for outcome in ("refused", "accepted")
    )
