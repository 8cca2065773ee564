"""Readers, checks and error lines of ``harness.workload.reading``, on real files."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig, SyntheticPrompt
from harness.workload import datasets, json_file, reading
from harness.workload.reading import read, resolve
from harness.workload.records import Completion, Request, Workload

ROOT = Path(__file__).resolve().parents[1]
TEN_THOUSAND = Path(__file__).resolve().parents[2] / "shared/data/asc24_like_10k.json.gz"
TRIPLES: list[list[Any]] = [
    ["Hello, world", 4, 10],
    ["안녕하세요", 7, 3],
    [" ", 2, 1],
    ["nul \x00 inside", 5, 1_000_000],
]
NO_CAP = GenerationConfig()


def chat(*values: Any) -> dict[str, Any]:
    """A ShareGPT conversation."""
    return {"id": "x", "conversations": [{"from": "human", "value": value} for value in values]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes bytes, text or a JSON value to a file and returns its path."""

    def write(content: Any, name: str = "data.json") -> str:
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def refusal(name: str, path: str | None = None, **keys: Any) -> str:
    """Reads a dataset that must be refused and returns the error line."""
    with pytest.raises(UserError) as caught:
        read(DatasetConfig(name=name, path=path, **keys))
    line = str(caught.value)
    assert "\n" not in line
    return line


def assert_valid(loaded: Workload) -> None:
    """Checks what every resolved workload promises."""
    assert loaded.requests
    for index, request in enumerate(loaded.requests):
        assert request.index == index
        assert type(request.output_len) is int and request.output_len >= 1
        assert (request.prompt == "") == (request.prompt_ids is not None)
        request.prompt.encode()
        claimed = request.claimed_prompt_len
        assert claimed is None or (type(claimed) is int and 1 <= claimed <= 1_000_000)


# What is read


def test_asc24(write: Callable[..., str]) -> None:
    path = write(TRIPLES)
    loaded = read(DatasetConfig(name="asc24", path=path))
    assert loaded.name == "asc24" and loaded.path == path and loaded.left_out == 0
    assert loaded.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert loaded.requests == [
        Request(index, prompt, output_len, prompt_len) for index, (prompt, prompt_len, output_len) in enumerate(TRIPLES)
    ]
    assert_valid(resolve(loaded, NO_CAP))


@pytest.mark.parametrize("name", ["data.json.gz", "data.json"])
def test_gzip_is_recognised_by_its_content(write: Callable[..., str], name: str) -> None:
    stored = gzip.compress(json.dumps(TRIPLES).encode())
    loaded = read(DatasetConfig(name="asc24", path=write(stored, name)))
    assert [request.prompt for request in loaded.requests] == [prompt for prompt, _, _ in TRIPLES]
    assert loaded.sha256 == hashlib.sha256(stored).hexdigest()


def test_plain_json_may_be_called_gz(write: Callable[..., str]) -> None:
    assert len(read(DatasetConfig(name="asc24", path=write(TRIPLES, "data.json.gz"))).requests) == 4


def test_byte_order_mark_and_unescaped_text(write: Callable[..., str]) -> None:
    text = "\ufeff" + json.dumps([["안녕 \u2028 ¿qué?", 3, 4]], ensure_ascii=False) + "\r\n"
    loaded = read(DatasetConfig(name="asc24", path=write(text)))
    assert loaded.requests == [Request(0, "안녕 \u2028 ¿qué?", 4, 3)]


def test_surrogate_pair_escapes_are_one_character(write: Callable[..., str]) -> None:
    loaded = read(DatasetConfig(name="asc24", path=write('[["\\ud83d\\ude00", 1, 1]]')))
    assert loaded.requests[0].prompt == "\U0001f600"


def test_num_samples_takes_the_first(write: Callable[..., str]) -> None:
    path = write(TRIPLES)
    loaded = read(DatasetConfig(name="asc24", path=path, num_samples=2))
    assert [request.prompt for request in loaded.requests] == ["Hello, world", "안녕하세요"]
    assert len(read(DatasetConfig(name="asc24", path=path, num_samples=4)).requests) == 4


def test_the_whole_file_is_checked_even_for_one_sample(write: Callable[..., str]) -> None:
    assert "record 1 (" in refusal("asc24", write([["a", 1, 1], ["b", 1, 0]]), num_samples=1)


def test_duplicate_prompts_are_kept(write: Callable[..., str]) -> None:
    assert len(read(DatasetConfig(name="asc24", path=write([["same", 1, 1]] * 3))).requests) == 3


def test_home_directory_in_path(write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(TRIPLES)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read(DatasetConfig(name="asc24", path="~/data.json")).requests) == 4


def test_sharegpt(write: Callable[..., str]) -> None:
    conversations = [
        chat("only one turn"),
        chat("first", "one two three", "more"),
        chat(),
        chat("", "no prompt"),
        chat("second", "one"),
        chat("no reply", ""),
        chat("third", "   "),
        chat("fourth", "one two"),
    ]
    path = write(gzip.compress(json.dumps(conversations).encode()))
    loaded = read(DatasetConfig(name="sharegpt", path=path))
    assert loaded.left_out == 4
    assert loaded.requests[0] == Request(0, "first", None, reply="one two three")
    assert [request.prompt for request in loaded.requests] == ["first", "second", "third", "fourth"]
    asked: list[list[str]] = []

    def count(texts: list[str]) -> list[int]:
        asked.append(texts)
        return [len(text.split()) for text in texts]

    resolved = resolve(loaded, NO_CAP, count_tokens=count)
    assert asked == [["one two three", "one", "   ", "one two"]]
    lengths = [(request.prompt, request.output_len) for request in resolved.requests]
    assert lengths == [("first", 3), ("second", 1), ("fourth", 2)]
    assert resolved.left_out == 5
    assert_valid(resolved)
    assert [request.output_len for request in loaded.requests] == [None] * 4  # the input is left as it was


def test_sharegpt_with_a_fixed_output_len_needs_no_reply(write: Callable[..., str]) -> None:
    path = write([chat("a", ""), chat("b"), chat("c", "reply")])
    loaded = read(DatasetConfig(name="sharegpt", path=path, output_len=9))
    assert [(request.prompt, request.output_len) for request in loaded.requests] == [("a", 9), ("c", 9)]
    assert loaded.left_out == 1
    assert resolve(loaded, NO_CAP) == loaded


def test_sharegpt_num_samples_counts_usable_conversations(write: Callable[..., str]) -> None:
    path = write([chat("a"), chat("b", "B"), chat("c"), chat("d", "D"), chat("e")])
    loaded = read(DatasetConfig(name="sharegpt", path=path, num_samples=1))
    assert ([request.prompt for request in loaded.requests], loaded.left_out) == (["b"], 1)
    line = refusal("sharegpt", path, num_samples=3)
    assert line.startswith("dataset.num_samples: 3 asked for, but ")
    assert "holds 2 (3 more are not usable)" in line


def test_synthetic_hi_is_the_committees_prompt() -> None:
    loaded = read(DatasetConfig(name="synthetic", num_samples=3, input_len=5, output_len=7))
    assert loaded.requests == [Request(index, "hihihihi", 7, 5) for index in range(3)]
    assert (loaded.path, loaded.sha256) == (None, None)
    assert resolve(loaded, NO_CAP) == loaded


def test_synthetic_random_ids() -> None:
    config = DatasetConfig(
        name="synthetic",
        num_samples=20,
        input_len=50,
        output_len=7,
        prompt=SyntheticPrompt.random,
        seed=5,
    )
    loaded = read(config)
    assert all(request.prompt == "" and request.prompt_ids is None for request in loaded.requests)
    resolved = resolve(loaded, NO_CAP, vocab_size=10)
    assert_valid(resolved)
    drawn = [request.prompt_ids for request in resolved.requests]
    assert all(ids is not None and len(ids) == 50 for ids in drawn)
    assert {token for ids in drawn for token in ids or ()} == set(range(3, 10))
    assert len(set(drawn)) == 20
    assert resolve(loaded, NO_CAP, vocab_size=10) == resolved
    assert resolve(resolved, NO_CAP, vocab_size=10) == resolved
    other = resolve(read(dataclasses.replace(config, seed=6)), NO_CAP, vocab_size=10)
    assert [request.prompt_ids for request in other.requests] != drawn


@pytest.mark.parametrize(("vocab_size", "ids"), [(1, {0}), (2, {1}), (3, {2}), (4, {3}), (5, {3, 4})])
def test_random_ids_of_a_tiny_vocabulary(vocab_size: int, ids: set[int]) -> None:
    config = DatasetConfig(name="synthetic", num_samples=1, input_len=200, output_len=1, prompt=SyntheticPrompt.random)
    request = resolve(read(config), NO_CAP, vocab_size=vocab_size).requests[0]
    assert set(request.prompt_ids or ()) == ids


def test_max_output_len_only_lowers(write: Callable[..., str]) -> None:
    loaded = read(DatasetConfig(name="asc24", path=write(TRIPLES)))
    resolved = resolve(loaded, GenerationConfig(max_output_len=3))
    assert [request.output_len for request in resolved.requests] == [3, 3, 1, 3]
    with pytest.raises(UserError, match="max_output_len: 0 is below 1"):
        resolve(loaded, GenerationConfig(max_output_len=0))


def test_max_output_len_also_caps_counted_replies(write: Callable[..., str]) -> None:
    loaded = read(DatasetConfig(name="sharegpt", path=write([chat("a", "A"), chat("b", "B")])))
    resolved = resolve(loaded, GenerationConfig(max_output_len=8), count_tokens=lambda texts: [2, 20])
    assert [request.output_len for request in resolved.requests] == [2, 8]


def test_resolve_names_the_argument_it_lacks(write: Callable[..., str]) -> None:
    loaded = read(DatasetConfig(name="sharegpt", path=write([chat("a", "A")])))
    with pytest.raises(ValueError, match="count_tokens"):
        resolve(loaded, NO_CAP)
    with pytest.raises(ValueError, match="zip"):
        resolve(loaded, NO_CAP, count_tokens=lambda texts: [])
    config = DatasetConfig(name="synthetic", num_samples=1, input_len=2, output_len=1, prompt=SyntheticPrompt.random)
    for vocab_size in (None, 0, -1):
        with pytest.raises(ValueError, match="vocab_size"):
            resolve(read(config), NO_CAP, vocab_size=vocab_size)


def test_completion_fields_in_the_order_of_the_file() -> None:
    fields = [field.name for field in dataclasses.fields(Completion)]
    assert fields == [
        "index",
        "prompt_tokens",
        "output_tokens",
        "finish_reason",
        "token_ids",
        "text",
        "first_token_s",
        "finished_s",
        "error",
    ]


@pytest.mark.skipif(not TEN_THOUSAND.exists(), reason="the 10,000-request file is not part of the repository")
def test_ten_thousand_requests() -> None:
    loaded = read(DatasetConfig(name="asc24", path=str(TEN_THOUSAND)))
    assert len(loaded.requests) == 10_000
    assert sum(request.claimed_prompt_len or 0 for request in loaded.requests) == 1_935_214
    assert sum(request.output_len or 0 for request in loaded.requests) == 2_255_059
    assert loaded.sha256 == "eeba944a1ff6be53e2119fec24a0cc0095f95be365ad6f7d8034a6a8797b1cd3"
    assert_valid(resolve(loaded, NO_CAP))


# The shipped sample


def test_shipped_sample() -> None:
    lines = datasets.SAMPLE_PATH.read_text(encoding="utf-8").rstrip("\n").split("\n")
    records = [json.loads(line) for line in lines]
    assert len(records) >= 64
    languages = {record["language"] for record in records}
    assert len(languages) >= 8 and {"en", "zh", "ko", "es"} <= languages
    assert len({record["domain"] for record in records}) >= 6
    assert all(4 <= record["prompt_len"] <= 1024 for record in records)
    assert all(4 <= record["output_len"] <= 256 for record in records)
    loaded = read(DatasetConfig(name="sample"))
    assert loaded.requests == [
        Request(index, record["prompt"], record["output_len"], record["prompt_len"])
        for index, record in enumerate(records)
    ]
    assert loaded.sha256 == hashlib.sha256(datasets.SAMPLE_PATH.read_bytes()).hexdigest()
    assert_valid(resolve(loaded, NO_CAP))


def test_sample_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read(DatasetConfig(name="sample", num_samples=2)).requests) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"prompt": "a", "prompt_len": 1, "output_len": 1}\n{"prompt": "b", "prompt_len": 1}\n',
            "record 1 (",
        ),
        ('{"prompt": "a", "prompt_len": 1, "output_len": 1}\n{"prompt": "b\n', "line 2, column 14"),
        ("[]\n", "record 0 (counting from 0): a list of length 0"),
        ("\n", "dataset=sample: empty file"),
    ],
)
def test_damaged_sample(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, content: str, expected: str
) -> None:
    monkeypatch.setattr(reading, "SAMPLE_PATH", Path(write(content, "sample.jsonl")))
    assert expected in refusal("sample")


def test_sample_lines_may_hold_other_line_separators(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"prompt": "a\u2028b\u0085c", "prompt_len": 3, "output_len": 1}\n'
    monkeypatch.setattr(reading, "SAMPLE_PATH", Path(write(line * 2, "sample.jsonl")))
    assert [request.prompt for request in read(DatasetConfig(name="sample")).requests] == ["a\u2028b\u0085c"] * 2


# Config keys


@pytest.mark.parametrize("name", ["sample", "asc24", "sharegpt", "synthetic"])
def test_conf_options(write: Callable[..., str], name: str) -> None:
    option = OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), option))
    assert isinstance(config, DatasetConfig) and config.name == name
    if name in ("asc24", "sharegpt"):
        config.path = write(TRIPLES if name == "asc24" else [chat("a", "A")])
    loaded = read(config)
    assert loaded.name == name
    if name == "synthetic":
        assert len(loaded.requests) == 64
        assert loaded.requests[0] == Request(0, "hi" * 127, 64, 128)


@pytest.mark.parametrize("name", ["asc24", "sharegpt"])
@pytest.mark.parametrize("path", [None, ""])
def test_path_is_required(name: str, path: str | None) -> None:
    assert refusal(name, path).startswith(
        f"dataset.path: not given with dataset={name}; give the path of a JSON list of "
    )


@pytest.mark.parametrize("name", ["sample", "synthetic"])
def test_path_is_refused(name: str) -> None:
    line = refusal(name, "mine.json", num_samples=1)
    assert line.startswith(f"dataset.path: 'mine.json' given with dataset={name}")
    assert "use dataset=asc24 or dataset=sharegpt" in line


def test_unknown_dataset() -> None:
    assert refusal("asc25") == ("dataset.name: unknown dataset 'asc25'; use sample, asc24, sharegpt or synthetic")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sample", "input_len"),
        ("sample", "output_len"),
        ("asc24", "input_len"),
        ("asc24", "output_len"),
        ("sharegpt", "input_len"),
    ],
)
def test_lengths_are_refused_where_the_file_brings_them(name: str, key: str) -> None:
    line = refusal(name, None if name == "sample" else "x.json", **{key: 5})
    assert line.startswith(f"dataset.{key}: 5 given with dataset={name}, which brings its own lengths; leave it")
    assert ("generation.max_output_len" in line) == (key == "output_len")


@pytest.mark.parametrize("value", [0, -1, 1_000_001])
def test_sharegpt_output_len_out_of_range(value: int) -> None:
    assert refusal("sharegpt", "x.json", output_len=value).startswith(f"dataset.output_len: {value} is out of range")


@pytest.mark.parametrize("key", ["num_samples", "input_len", "output_len"])
@pytest.mark.parametrize(("value", "found"), [(None, "not given"), (0, "0 is out"), (-3, "-3"), (10**7, "1000")])
def test_synthetic_needs_sane_numbers(key: str, value: int | None, found: str) -> None:
    keys: dict[str, Any] = {"num_samples": 2, "input_len": 3, "output_len": 4, key: value}
    line = refusal("synthetic", **keys)
    assert line.startswith(f"dataset.{key}: {found}")
    assert line.endswith("give a whole number from 1 to 1,000,000")


def test_synthetic_hi_of_one_token_would_be_empty() -> None:
    line = refusal("synthetic", num_samples=1, input_len=1, output_len=1)
    assert line.startswith("dataset.input_len: 1 makes the prompt") and "dataset.prompt=random" in line


def test_synthetic_random_is_limited_in_total() -> None:
    keys: dict[str, Any] = {"num_samples": 1_000_000, "input_len": 1_000_000, "output_len": 1}
    line = refusal("synthetic", prompt=SyntheticPrompt.random, **keys)
    assert line.startswith("dataset.num_samples: 1,000,000 prompts of 1,000,000 random tokens")


def test_random_prompts_need_synthetic() -> None:
    line = refusal("sample", prompt=SyntheticPrompt.random)
    assert line.startswith("dataset.prompt: random given with dataset=sample") and "dataset=synthetic" in line


def test_num_samples_out_of_range(write: Callable[..., str]) -> None:
    path = write(TRIPLES)
    for value in (0, -1):
        assert refusal("asc24", path, num_samples=value) == (
            f"dataset.num_samples: {value} is out of range; give a whole number from 1, or null"
        )
    for value in (5, 2_000_000):
        assert refusal("asc24", path, num_samples=value) == (
            f"dataset.num_samples: {value:,} asked for, but {path!r} holds 4; "
            "give a number from 1 to 4, or null for all"
        )
    assert "dataset.num_samples: 5,000 asked for" in refusal("sample", num_samples=5000)


# Files that cannot be read


def test_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("asc24", "nowhere.json") == (
        "dataset.path: no such file: 'nowhere.json'; give the path of a JSON list of [prompt, prompt_len, output_len]"
    )
    assert refusal("sharegpt", "nowhere.json").endswith(
        'a JSON list of {"conversations": [{"from": ..., "value": ...}, ...]}'
    )


def test_directory(tmp_path: Path) -> None:
    assert refusal("asc24", str(tmp_path)).startswith(f"dataset.path: a directory, not a file: {str(tmp_path)!r}")


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal("asc24", str(tmp_path / "pipe"))
    assert "not a regular file" in refusal("asc24", "/dev/zero")


def test_paths_that_cannot_be_opened(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read (Too many levels of symbolic links)" in refusal("asc24", str(tmp_path / "loop"))
    assert "cannot be read (Not a directory)" in refusal("asc24", write(TRIPLES) + "/x")
    assert "cannot be read (File name too long)" in refusal("asc24", "x" * 5000)
    assert "embedded null" in refusal("asc24", "a\x00b")
    assert "not a path (" in refusal("asc24", "a\ud800b")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(write: Callable[..., str]) -> None:
    path = write(TRIPLES)
    os.chmod(path, 0)
    assert "cannot be read (Permission denied)" in refusal("asc24", path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_read_error() -> None:
    # A regular file whose first byte nobody can read, root included.
    assert "cannot be read (Input/output error): '/proc/self/mem'" in refusal("asc24", "/proc/self/mem")


def test_huge_files_are_refused_before_they_fill_the_memory(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(b"")
    os.truncate(path, 2**31 + 1)  # sparse: takes no space
    assert "more than 2,147,483,648 bytes" in refusal("asc24", path)
    monkeypatch.setattr(json_file, "MAX_FILE_BYTES", 1000)
    assert "more than 1,000 bytes when uncompressed" in refusal("asc24", write(gzip.compress(b" " * 1001)))


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", gzip.compress(b"")])
def test_empty_file(write: Callable[..., str], content: bytes) -> None:
    assert refusal("asc24", write(content)).startswith("dataset.path: empty file: ")


def test_truncated_gzip(write: Callable[..., str]) -> None:
    stored = gzip.compress(json.dumps(TRIPLES).encode())
    for end in range(2, len(stored)):
        assert "truncated gzip file" in refusal("asc24", write(stored[:end]))


def test_damaged_gzip(write: Callable[..., str]) -> None:
    stored = gzip.compress(random.Random(0).randbytes(200))
    assert "damaged gzip file (CRC check failed" in refusal("asc24", write(stored[:-8] + b"\0\0\0\0" + stored[-4:]))
    assert "damaged gzip file" in refusal("asc24", write(stored[:10] + b"\xff" * 20 + stored[30:]))
    assert "damaged gzip file (Unknown compression" in refusal("asc24", write(b"\x1f\x8b\x00" + stored[3:]))
    assert "damaged gzip file" in refusal("asc24", write(stored + b"tail"))


def test_truncated_json_is_recognised_at_every_byte(write: Callable[..., str]) -> None:
    whole = json.dumps([["a \u00e9 [x]", 12, 34], ["b\n", 5, 6]]).encode()
    for end in range(1, len(whole)):
        assert "truncated JSON" in refusal("asc24", write(whole[:end])), whole[:end]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_place_of_a_json_error(write: Callable[..., str], mark: str) -> None:
    line = refusal("asc24", write(mark + '[["é", 1, 2],\n ["b", 1 2]]'))
    offset = 24 + len(mark.encode())
    assert f"invalid JSON, Expecting ',' delimiter at line 2, column 10 (byte {offset})" in line
    line = refusal("asc24", write(mark + '[["é", 1, 2],\n ["b'))
    offset = 17 + len(mark.encode())
    assert f"truncated JSON, Unterminated string starting at line 2, column 3 (byte {offset})" in line


@pytest.mark.parametrize("text", ["prompt,10,20\n", "[['a', 1, 2]]", '[["a", 1, 2],]', "\x00", "<html></html>", "[1]]"])
def test_not_json(write: Callable[..., str], text: str) -> None:
    assert refusal("asc24", write(text)).startswith("dataset.path: invalid JSON, ")


def test_json_lines(write: Callable[..., str]) -> None:
    assert "3 JSON values in a row, not one list" in refusal("asc24", write('["a", 1, 2]\n' * 3))


@pytest.mark.parametrize(("prefix", "offset"), [(b"", 2), (b"\xef\xbb\xbf", 5)])
def test_not_utf8(write: Callable[..., str], prefix: bytes, offset: int) -> None:
    line = refusal("asc24", write(prefix + b'["\xff", 1, 2]'))
    assert f"not UTF-8, invalid start byte at byte {offset} (0xff)" in line
    line = refusal("asc24", write(prefix + b'["\xe9'))
    assert f"not UTF-8, unexpected end of data at byte {offset} (0xe9)" in line
    assert "not UTF-8, invalid start byte at byte 0 (0xff)" in refusal("asc24", write(b"\xff\xfe[\0]\0"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_nesting(write: Callable[..., str], text: str) -> None:
    assert "JSON nested too deeply" in refusal("asc24", write(text))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (True, "true"),
        (5, "5"),
        (float("nan"), "the float nan"),
        ("text", "the string 'text'"),
        ({}, "an empty object"),
        ({"prompt": 1, "b": 2}, "an object with the keys ['prompt', 'b']"),
    ],
)
def test_not_a_list(write: Callable[..., str], value: Any, found: str) -> None:
    for name in ("asc24", "sharegpt"):
        assert refusal(name, write(json.dumps(value))).startswith(f"dataset.path: {found}, not a list: ")


@pytest.mark.parametrize("name", ["asc24", "sharegpt"])
def test_empty_list(write: Callable[..., str], name: str) -> None:
    assert "dataset.path: an empty list: " in refusal(name, write([]))


# Records


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (None, "null"),
        ("p", "the string 'p'"),
        (7, "7"),
        ([], "a list of length 0"),
        (["p", 1], "a list of length 2"),
        (["p", 1, 2, 3], "a list of length 4"),
        ({"prompt": "p"}, "an object with the keys ['prompt']"),
    ],
)
def test_record_that_is_no_triple(write: Callable[..., str], record: Any, found: str) -> None:
    line = refusal("asc24", write([["good", 1, 1], record]))
    assert line == (
        f"dataset.path, record 1 (counting from 0): {found}, not [prompt, prompt_len, output_len]; "
        "write it as [prompt, prompt_len, output_len]"
    )


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("null", "null is not a string"),
        ("5", "5 is not a string"),
        ("[]", "a list of length 0 is not a string"),
        ("9" * 5000, "an integer of 5,000 digits is not a string"),
        ('""', "the string is empty"),
        ('"ab\\ud800c"', "character 2 is the lone surrogate '\\ud800'"),
        ('"\\udc00"', "character 0 is the lone surrogate '\\udc00'"),
    ],
)
def test_bad_prompt(write: Callable[..., str], prompt: str, found: str) -> None:
    path = write(f'[["good", 1, 1], ["good", 1, 1], [{prompt}, 1, 1]]')
    assert (
        refusal("asc24", path) == f"dataset.path, record 2 (counting from 0), prompt: {found}; correct it in {path!r}"
    )


@pytest.mark.parametrize(
    ("literal", "found"),
    [
        ("true", "true"),
        ("false", "false"),
        ("null", "null"),
        ("5.0", "the float 5.0"),
        ("1e2", "the float 100.0"),
        ("NaN", "the float nan"),
        ("Infinity", "the float inf"),
        ("-Infinity", "the float -inf"),
        ("1e999", "the float inf"),
        ('"5"', "the string '5'"),
        ("[5]", "a list of length 1"),
        ("-1", "-1"),
        ("0", "0"),
        ("-0", "0"),
        ("1000001", "1000001"),
        ("1" + "0" * 5000, "an integer of 5,001 digits"),
        ("-1" + "0" * 5000, "an integer of 5,001 digits"),
    ],
)
@pytest.mark.parametrize("field", ["prompt_len", "output_len"])
def test_bad_length(write: Callable[..., str], field: str, literal: str, found: str) -> None:
    lengths = f"{literal}, 1" if field == "prompt_len" else f"1, {literal}"
    path = write(f'[["good", 1, 1], ["bad", {lengths}]]')
    assert refusal("asc24", path) == (
        f"dataset.path, record 1 (counting from 0), {field}: {found} is not a whole number from 1 to 1,000,000; "
        f"correct it in {path!r}"
    )


def test_the_other_dataset_is_recognised(write: Callable[..., str]) -> None:
    line = refusal("asc24", write([chat("a", "b")]))
    assert line.startswith(
        "dataset.path, record 0 (counting from 0): an object with the keys ['id', 'conversations'], not ["
    )
    assert line.endswith("; use dataset=sharegpt for this file")
    assert refusal("sharegpt", write(TRIPLES)).endswith("; use dataset=asc24 for this file")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("x", ": the string 'x', not {"),
        ({"id": "x"}, ": an object with the keys ['id'], not {"),
        ({"conversations": None}, ", conversations: null is not a list;"),
        ({"conversations": ["a", "b"]}, ", conversations[0]: the string 'a' is not an object;"),
        ({"conversations": [{"value": "a"}, {}]}, ", conversations[1].value: null is not a string;"),
        (chat("a", 5), ", conversations[1].value: 5 is not a string;"),
        (chat("a", "\ud800"), ", conversations[1].value: character 0 is the lone surrogate '\\ud800';"),
    ],
)
def test_bad_conversation(write: Callable[..., str], record: Any, expected: str) -> None:
    line = refusal("sharegpt", write([chat("good", "good"), record]))
    assert line.startswith("dataset.path, record 1 (counting from 0)" + expected)


def test_no_usable_conversation(write: Callable[..., str]) -> None:
    line = refusal("sharegpt", write([chat("a"), chat("", "b")]))
    assert line.startswith("dataset.path: none of the 2 conversations has a prompt and a reply: ")
    loaded = read(DatasetConfig(name="sharegpt", path=write([chat("a"), chat("a", " ")])))
    with pytest.raises(UserError, match="none of the 2 conversations has a reply of at least one"):
        resolve(loaded, NO_CAP, count_tokens=lambda texts: [0])


def test_a_small_file_that_would_fill_the_memory(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(gzip.compress(b"[" + b"[]," * 10_000 + b"[]]"))
    monkeypatch.setattr(reading.memory, "available_memory_bytes", lambda: 2_600_000)
    assert refusal("asc24", path).startswith("dataset.path: reading it may take 0.0 GiB, 0.0 GiB of memory are free: ")
    monkeypatch.setattr(reading.memory, "available_memory_bytes", lambda: 2_700_000)
    assert refusal("asc24", path).startswith("dataset.path, record 0")


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
        patch.setattr(reading, "SAMPLE_PATH", fuzzed)
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


def test_module_is_light() -> None:
    code = (
        "import sys, harness.workload.reading\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'numpy', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
