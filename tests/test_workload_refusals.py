"""Datasets that ``harness.workload.reading`` refuses: one line that names file, record and what to do."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import datasets
from support.datasets import NO_CAP, TRIPLES, chat, refusal

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig
from harness.workload import stored_file
from harness.workload.reading import read, resolve

write = datasets.write


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
    monkeypatch.setattr(stored_file, "MAX_FILE_BYTES", 1000)
    assert "more than 1,000 bytes when uncompressed" in refusal("asc24", write(gzip.compress(b" " * 1001)))


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", gzip.compress(b"", mtime=0)])
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
    assert refusal("asc24", write(json.dumps(value))).startswith(f"dataset.path: {found}, not a list: ")
    assert refusal("sharegpt", write(json.dumps(value))).startswith(f"dataset.path, line 1: {found}, not {{")


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
    assert line.endswith('"value": ...}, ...]}: use dataset=sharegpt')
    assert refusal("sharegpt", write(TRIPLES)).endswith(
        "; this is a JSON list of [prompt, prompt_len, output_len]: use dataset=asc24"
    )


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
    monkeypatch.setattr("harness.machine.memory.available_memory_bytes", lambda: 2_600_000)
    assert refusal("asc24", path).startswith("dataset.path: reading it may take 0.0 GiB, 0.0 GiB of memory are free: ")
    monkeypatch.setattr("harness.machine.memory.available_memory_bytes", lambda: 2_700_000)
    assert refusal("asc24", path).startswith("dataset.path, record 0")
