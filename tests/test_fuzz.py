"""Thousands of malformed datasets: one line, or exactly the requests that an independent reading of the file finds."""

from __future__ import annotations

import bz2
import collections
import gzip
import json
import lzma
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.patience import no_hang

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig
from harness.workload import json_file
from harness.workload.reading import read, resolve

FILE_LIMIT = 1_500_000  # in place of 2 GiB, so that a bomb is a small one
LONGEST = 1_000_000  # tokens
NAMES = ("asc24", "sharegpt", "sample")


def assert_one_line(error: UserError) -> None:
    """Asserts that the refusal can stand on a terminal: short, printable, and saying where, what and what to do."""
    line = str(error)
    assert 10 < len(line) <= 600
    assert line.isprintable(), ascii(line)
    assert error.field and error.found
    line.encode()


# What the file says, read without the harness.


class Expected(NamedTuple):
    """One request: its length is None where it is that of the reply."""

    prompt: str
    claimed: int | None
    output_len: int | None
    reply: str | None


class Malformed(Exception):
    """The file must be refused."""


def text_of(data: bytes) -> str:
    if len(data) > FILE_LIMIT:
        raise Malformed
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise Malformed from error
        if len(data) > FILE_LIMIT:
            raise Malformed
    try:
        return str(data.removeprefix(b"\xef\xbb\xbf"), "utf-8")
    except UnicodeDecodeError as error:
        raise Malformed from error


def values_of(text: str, many: bool) -> list[Any]:
    """Returns the records; ``many`` for values one after the other in place of one list."""
    # Only the size of a long integer matters, and int() refuses more than 4,300 digits.
    decoder = json.JSONDecoder(parse_int=lambda digits: int(digits[:25]))
    try:
        if not many:
            value = decoder.decode(text)
            if not isinstance(value, list):
                raise Malformed
            return value
        values = []
        rest = text.strip(" \t\r\n")
        while rest:
            value, end = decoder.raw_decode(rest)
            values.append(value)
            rest = rest[end:].lstrip(" \t\r\n")
        return values
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LONGEST


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
    records = values_of(text_of(data), many=name == "sample")
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


class Raw(str):
    """JSON text that goes into the file as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object, its keys in order; the same key may come twice."""


def written(value: Any, comma: str = ", ") -> str:
    """Returns a value as JSON, or as something like it where there are parts that are :class:`Raw`."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + comma.join(f"{json.dumps(key)}: {written(item, comma)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + comma.join(written(item, comma) for item in value) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value))


ODD = [
    *map(Raw, ("NaN", "-Infinity", "Infinity", "1e999", "-1e999", "-0", "-1", "0", "1.0", "5.5", "1e3", "1E2", "-")),
    *map(Raw, ("1" * 5000, "-" + "9" * 21, "9" * 18, "1000001", "1000000", "01", "+1", "0x10", "1_000", ".5", "5.")),
    *map(Raw, ("true", "false", "null", "True", "None", "undefined", '"5"', "'single'", "\u0661", "\uff11", "")),
    *map(
        Raw,
        ('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\x41"', '"\\u12"', '"a\nb"', '"\x00"', '"\x1b[2J"'),
    ),
    *map(
        Raw, ('"\\u0000"', '"\x7f\x85\u2028\u202e"', '""', '" "', '"unterminated', "{}", "[]", "/*c*/1", "1 // c", "{]")
    ),
    *map(
        Raw, ("[" * 50_000, "[" * 50_000 + "]" * 50_000, '{"value":' * 50_000 + "1" + "}" * 50_000, "[" * 50 + "]" * 50)
    ),
    Raw('"' + "x" * 200_000 + '"'),
    Raw('"\\u0061' + "\u00e9\U0001f600" * 20_000 + '"'),
    *("=cmd|' /C calc'!A0", "../../etc/passwd", "${oc.env:HOME}", "{{7*7}}", "!!python/object:os.system", "<|im_end|>"),
]
TEXT = st.one_of(st.text(max_size=12), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
PLAIN = st.text("abc \u00e9\u4f60\U0001f600", min_size=1, max_size=12)
SOUND = st.one_of(PLAIN, PLAIN, PLAIN, TEXT)
LENGTH = st.one_of(st.integers(1, 2048), st.integers(1, LONGEST))
ANY = st.one_of(st.sampled_from(ODD), TEXT, st.integers(), st.floats(), st.booleans(), st.none())


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


def places(value: Any) -> list[tuple[Any, int]]:
    """Returns every (list, index) inside ``value``; those of an object are its pairs."""
    found = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found.append((value, index))
            found += places(item[1] if isinstance(value, Pairs) else item)
    return found


def mutate(draw: st.DrawFn, tree: list[Any]) -> None:
    """Changes one node of ``tree``."""
    where = places(tree)
    if not where:
        return
    parent, index = draw(st.sampled_from(where))
    deed = draw(st.sampled_from(["replace", "replace", "replace", "delete", "duplicate", "wrap", "move", "key"]))
    pair = isinstance(parent, Pairs)
    old = parent[index][1] if pair else parent[index]
    if deed == "delete":
        del parent[index]
    elif deed == "duplicate":
        parent.insert(draw(st.integers(0, len(parent))), (parent[index][0], draw(ANY)) if pair else old)
    elif deed == "key" and pair:
        names = ["value", "conversations", "prompt", "prompt_len", "output_len", "", "__proto__", "\ud800", "Prompt"]
        parent[index] = (draw(st.sampled_from(names)), old)
    else:
        if deed == "move":
            other, at = draw(st.sampled_from(where))
            new = other[at][1] if isinstance(other, Pairs) and at < len(other) else draw(ANY)
            new = Raw(written(new))  # a copy: a list inside itself has no end
        else:
            new = [old] if deed == "wrap" else draw(ANY)
        parent[index] = (parent[index][0], new) if pair else new


def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Returns ``data`` cut, flipped, shortened or lengthened at any byte."""
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    deed = draw(st.sampled_from(["cut", "flip", "insert", "drop", "repeat"]))
    if deed == "cut":
        return data[:at]
    if deed == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if deed == "insert":
        return (
            data[:at]
            + draw(st.sampled_from([b"\x00", b"\xff", b"\xef\xbb\xbf", b"\x1b", b",", b"]", b'"', b"\\"]))
            + data[at:]
        )
    until = at + draw(st.integers(1, 20))
    return data[:at] + data[until:] if deed == "drop" else data[:until] + data[at:]


def squeezed(draw: st.DrawFn, data: bytes) -> bytes:
    """Returns ``data`` compressed, rightly or not."""
    whole = gzip.compress(data, compresslevel=1, mtime=0)
    half = len(data) // 2
    members = gzip.compress(data[:half], 1, mtime=0) + gzip.compress(data[half:], 1, mtime=0)
    bomb = gzip.compress(data + b" " * (FILE_LIMIT + 1), 1, mtime=0) if draw(st.integers(0, 19)) == 0 else whole
    return draw(
        st.sampled_from(
            [
                *(whole, members, whole + b"\x00" * 9, whole + b"garbage", whole + whole, whole[:-1], whole[:12], bomb),
                *(gzip.compress(whole, 1, mtime=0), b"\x1f\x8b" + data, zlib.compress(data), bz2.compress(data)),
                *(lzma.compress(data, preset=0), members[:-4], whole[:3] + b"\xff" + whole[4:]),
            ]
        )
    )


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
    monkeypatch.setattr(json_file, "MAX_FILE_BYTES", FILE_LIMIT)
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
    assert all(
        tally[f"{name}, {outcome}"] > tally.total() / 50 for name in NAMES for outcome in ("refused", "accepted")
    )
