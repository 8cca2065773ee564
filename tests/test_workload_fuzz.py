"""Any file at all: the requests that are in it, or one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import NO_CAP, assert_valid, chat

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig
from harness.workload.reading import read, resolve

# Anything at all

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(1, 100),
    st.floats(),
    st.text(st.characters(), max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["conversations", "value", "prompt", "id"]), inner, max_size=3),
    ),
    max_leaves=12,
)
# Half of the lists hold only sound records, so that both outcomes are met often.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
LENGTH = st.integers(1, 1_000_000)
BAD_LENGTH = st.sampled_from([0, -1, 1_000_001, 5.0, True, None, "5"])
TRIPLE = st.tuples(TEXT, LENGTH, LENGTH)
BAD_TRIPLE = st.one_of(VALUES, st.tuples(SCALARS, LENGTH, LENGTH), st.tuples(TEXT, LENGTH, BAD_LENGTH))
CHAT = st.builds(chat, TEXT, TEXT)
BAD_CHAT = st.one_of(
    VALUES, st.builds(chat, SCALARS, SCALARS), st.builds(lambda turns: {"conversations": turns}, VALUES)
)
OBJECT = st.builds(lambda values: dict(zip(("prompt", "prompt_len", "output_len"), values, strict=True)), TRIPLE)


def several(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.one_of(st.lists(good, min_size=1, max_size=4), st.lists(st.one_of(good, bad), max_size=4))


def encoded(value: Any, ensure_ascii: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")


NAMED_FILES = st.one_of(
    st.tuples(st.just("asc24"), st.builds(encoded, several(TRIPLE, BAD_TRIPLE), st.booleans())),
    st.tuples(st.just("sharegpt"), st.builds(encoded, several(CHAT, BAD_CHAT), st.booleans())),
    st.tuples(st.just("sample"), several(OBJECT, VALUES).map(lambda lines: b"\n".join(map(encoded, lines)))),
    st.tuples(st.sampled_from(["asc24", "sharegpt", "sample"]), st.one_of(st.binary(), VALUES.map(encoded))),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "data.json"


@settings(max_examples=400, deadline=None)
@given(
    named=NAMED_FILES,
    compress=st.booleans(),
    cut=st.one_of(st.none(), st.sampled_from([None, None, -1, -3, 5, 20])),
    num_samples=st.sampled_from([None, None, 1, 2]),
)
def test_any_file_is_valid_or_one_line(
    fuzzed: Path, named: tuple[str, bytes], compress: bool, cut: int | None, num_samples: int | None
) -> None:
    name, content = named
    fuzzed.write_bytes((gzip.compress(content) if compress else content)[:cut])
    path = None if name == "sample" else str(fuzzed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.workload.formats.sample.SAMPLE_PATH", fuzzed)
        try:
            loaded = read(DatasetConfig(name=name, path=path, num_samples=num_samples))
            loaded = resolve(loaded, NO_CAP, count_tokens=lambda texts: [len(text.split()) for text in texts])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) <= 600
            str(error).encode()
            return
    assert num_samples is None or len(loaded.requests) <= num_samples
    assert_valid(loaded)


@settings(max_examples=100, deadline=None)
@given(
    triples=st.lists(TRIPLE, min_size=1, max_size=5),
    ensure_ascii=st.booleans(),
    compress=st.booleans(),
)
def test_every_good_file_is_read_unchanged(
    fuzzed: Path, triples: list[tuple[str, int, int]], ensure_ascii: bool, compress: bool
) -> None:
    content = json.dumps(triples, ensure_ascii=ensure_ascii).encode()
    fuzzed.write_bytes(gzip.compress(content) if compress else content)
    loaded = read(DatasetConfig(name="asc24", path=str(fuzzed)))
    found = [(request.prompt, request.claimed_prompt_len, request.output_len) for request in loaded.requests]
    assert found == triples
