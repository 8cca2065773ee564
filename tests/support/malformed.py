"""Malformed files of prompts: what they are drawn from, and what must be refused of them, read without the harness."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from typing import Any

from hypothesis import strategies as st

from harness.basics.errors import UserError

FILE_LIMIT = 1_500_000  # in place of 2 GiB, so that a bomb is a small one
LONGEST = 1_000_000  # tokens
NAMES = ("value", "conversations", "prompt", "prompt_len", "output_len", "", "__proto__", "\ud800", "Prompt")


def assert_one_line(error: UserError) -> None:
    """Asserts that the refusal can stand on a terminal: short, printable, and saying where, what and what to do."""
    line = str(error)
    assert 10 < len(line) <= 600
    assert line.isprintable(), ascii(line)
    assert error.field and error.found
    line.encode()


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


def values_of(text: str, many: bool, either: bool = False) -> list[Any]:
    """Returns the records; ``many`` for values one after the other in place of one list, ``either`` for both."""
    # Only the size of a long integer matters, and int() refuses more than 4,300 digits.
    decoder = json.JSONDecoder(parse_int=lambda digits: int(digits[:25]))
    try:
        if not many and not either:
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
        if either and len(values) == 1 and isinstance(values[0], list):
            return list(values[0])
        return values
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LONGEST


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


def places(value: Any) -> list[tuple[Any, int]]:
    """Returns every (list, index) inside ``value``; those of an object are its pairs."""
    found = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found.append((value, index))
            found += places(item[1] if isinstance(value, Pairs) else item)
    return found


def mutate(draw: st.DrawFn, tree: list[Any], names: tuple[str, ...] = NAMES) -> None:
    """Changes one node of ``tree``; ``names`` are what a key may become."""
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
