"""Which ``dataset=`` option a file is for, by what stands in it."""

from __future__ import annotations

import codecs
import json
import os
import zlib
from typing import NamedTuple

from harness.basics.errors import UserError, quoted
from harness.workload import catalogue, hub_folder
from harness.workload.arrow_file import PARQUET
from harness.workload.csv_file import DELIMITERS, header_of
from harness.workload.fields import IDS, OUTPUT_LENGTHS, PROMPT_LENGTH, PROMPTS
from harness.workload.formats.base import Format, StoredFormat
from harness.workload.json_file import DECODER, VALUE_START

HEAD = 2**22  # bytes that are looked at


class Recognised(NamedTuple):
    """The option, and what such a file is called."""

    option: str
    what: str


def option_of(path: str) -> Recognised | None:
    """Returns the ``dataset=`` option that reads a file or a directory; None where none surely does."""
    return by_content(path) or by_name(path)


def check(path: str, chosen: Format) -> None:
    """Raises UserError for a file that ``chosen`` would read without an error, though it is of another format."""
    found = option_of(path)
    if found is not None and found.option != chosen.name:
        said = f"{quoted(path, 300)} given with dataset={chosen.name}"
        raise UserError("dataset.path", said, f"this is {found.what}: use dataset={found.option}")


def better(error: UserError, path: str, besides: Format) -> UserError:
    """Returns the error for a file that could not be read as ``besides``: with its own format, if that is another."""
    found = option_of(path)
    if found is None or found.option == besides.name:
        return error
    return UserError(error.field, error.found, f"this is {found.what}: use dataset={found.option}")


def by_content(path: str) -> Recognised | None:
    """Returns what a file surely is, by its first bytes; None where that is not clear or it cannot be read."""
    path = os.path.expanduser(path)
    try:
        if os.path.isdir(path):
            return _named("huggingface") if hub_folder.holds_data(path) else None
        head = _head(path)
    except (OSError, ValueError, zlib.error):
        return None
    if head.startswith(PARQUET):
        return _named("parquet")
    try:
        text = _text(head)
    except UnicodeDecodeError:
        return None
    start = VALUE_START.search(text)
    if start is None:
        return None
    if start[0] in "[{":
        return _of_json(text, start.start())
    return _named("csv") if _is_header(text) else None


def by_name(path: str) -> Recognised | None:
    """Returns what a text may be by the end of its name, else plain text; None for what looks like broken JSON."""
    path = os.path.expanduser(path)
    try:
        text = "" if os.path.isdir(path) else _text(_head(path)).strip()
    except (OSError, ValueError, zlib.error):
        return None
    if not text or text[0] in "[{" or "\0" in text:
        return None
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    return _named("csv" if suffix in (".csv", ".tsv") else "text")


def _named(option: str) -> Recognised:
    return Recognised(option, catalogue.known()[option].what)


def _head(path: str) -> bytes:
    """Returns the first bytes of a file, unpacked; raises OSError or zlib.error."""
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    with open(path, "rb") as stream:
        data = stream.read(HEAD)
    return zlib.decompressobj(wbits=31).decompress(data, HEAD) if data.startswith(b"\x1f\x8b") else data


def _text(head: bytes) -> str:
    """Returns the first bytes of a file as text, whose end may be in the middle of a character."""
    return codecs.getincrementaldecoder("utf-8-sig")().decode(head)


def _of_json(text: str, start: int) -> Recognised | None:
    """Returns what the first record of a JSON file is, which stands in a list or alone."""
    listed = text[start] == "["
    try:
        first = VALUE_START.search(text, start + 1) if listed else None
        value, _ = DECODER.raw_decode(text, first.start() if first else start)
    except (json.JSONDecodeError, RecursionError):
        return None
    for name, one in catalogue.known().items():
        if isinstance(one, StoredFormat) and one.recognises(value):
            return Recognised(name, f"a JSON list of {one.record}" if listed else one.what or one.wanted)
    return None


def _is_header(text: str) -> bool:
    """Returns whether the first line names columns, the prompt's and another that is known."""
    headers = [set(header_of(text, delimiter)) for delimiter in DELIMITERS]
    return any(names & set(PROMPTS) and names & {*OUTPUT_LENGTHS, *IDS, PROMPT_LENGTH} for names in headers)
