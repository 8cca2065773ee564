"""Readers, checks and error lines of ``harness.workload.reading``, on real files."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support import datasets
from support.datasets import NO_CAP, TRIPLES, assert_valid, chat, refusal

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig, SyntheticPrompt
from harness.workload.formats import sample
from harness.workload.reading import read, resolve
from harness.workload.records import Completion, Request

write = datasets.write

ROOT = Path(__file__).resolve().parents[1]
TEN_THOUSAND = Path(__file__).resolve().parents[2] / "shared/data/asc24_like_10k.json.gz"


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
    with pytest.raises(ValueError, match="0 counts of 1 texts"):
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
        "id",
        "shared_tokens",
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
    lines = sample.SAMPLE_PATH.read_text(encoding="utf-8").rstrip("\n").split("\n")
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
    assert loaded.sha256 == hashlib.sha256(sample.SAMPLE_PATH.read_bytes()).hexdigest()
    assert_valid(resolve(loaded, NO_CAP))


def test_sample_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read(DatasetConfig(name="sample", num_samples=2)).requests) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"prompt": "a", "prompt_len": 1, "output_len": 1}\n{"prompt": "b", "prompt_len": 1}\n',
            "line 2, output_len: null",
        ),
        ('{"prompt": "a", "prompt_len": 1, "output_len": 1}\n{"prompt": "b\n', "line 2, column 14"),
        ("[]\n", "line 1: a list of length 0"),
        ("\n", "dataset=sample: empty file"),
    ],
)
def test_damaged_sample(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, content: str, expected: str
) -> None:
    monkeypatch.setattr("harness.workload.formats.sample.SAMPLE_PATH", Path(write(content, "sample.jsonl")))
    assert expected in refusal("sample")


def test_sample_lines_may_hold_other_line_separators(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"prompt": "a\u2028b\u0085c", "prompt_len": 3, "output_len": 1}\n'
    monkeypatch.setattr("harness.workload.formats.sample.SAMPLE_PATH", Path(write(line * 2, "sample.jsonl")))
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
    assert "use dataset=asc24, dataset=csv, dataset=huggingface, " in line


def test_unknown_dataset() -> None:
    assert refusal("asc25") == (
        "dataset.name: unknown dataset 'asc25'; use "
        "sample, asc24, csv, huggingface, jsonl, openai_batch, parquet, sharegpt, text or synthetic"
    )


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
    keys: dict[str, Any] = {"num_samples": 1_000, "input_len": 1_000_000, "output_len": 1}
    line = refusal("synthetic", prompt=SyntheticPrompt.random, **keys)
    assert line.startswith("dataset.num_samples: 1,000 prompts of 1,000,000 random tokens")


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


def test_module_is_light() -> None:
    code = (
        "import sys, harness.workload.reading\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'numpy', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
