"""JSON read record by record, so that a large or a broken file is told in one line."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.machine import memory

MAX_LENGTH = 1_000_000  # tokens of one prompt or one output
BYTES_A_LIST, BYTES_A_VALUE = 180, 80  # in memory, of a list or object in a file, and of a value in one (measured)
MAX_FILE_BYTES = 2**31  # stored or uncompressed; the whole file is held in memory
_RECORDS = {
    "asc24": "[prompt, prompt_len, output_len]",
    "sample": '{"prompt": ..., "prompt_len": ..., "output_len": ...}',
    "sharegpt": '{"conversations": [{"from": ..., "value": ...}, ...]}',
}
_VALUE_START = re.compile(r"[^ \t\n\r]")


@dataclass(frozen=True, slots=True)
class _HugeInteger:
    """An integer that is certainly no length; ``int()`` refuses those of more than 4,300 digits."""

    digits: int


def _parse_int(literal: str) -> int | _HugeInteger:
    return int(literal) if len(literal) <= 20 else _HugeInteger(len(literal.lstrip("-")))


_DECODER = json.JSONDecoder(parse_int=_parse_int)


@dataclass(frozen=True, slots=True)
class _File:
    """A dataset file, and the errors that name it."""

    name: str  # the dataset= option
    path: str

    @property
    def field(self) -> str:
        """The key that chose the file."""
        return "dataset=sample" if self.name == "sample" else "dataset.path"

    def error(self, found: str, remedy: str = "") -> UserError:
        found = f"{found}: {quoted(self.path, 300)}"
        if self.name == "sample":
            return UserError(self.field, found, "restore harness/workload/data/sample.jsonl from the repository")
        return UserError(self.field, found, remedy or f"give the path of {_wanted(self.name)}")

    def read(self) -> tuple[bytes, str]:
        """Returns the uncompressed bytes, and the SHA-256 of the stored ones."""
        too_large = f"more than {MAX_FILE_BYTES:,} bytes"
        try:
            status = os.stat(self.path)
            if stat.S_ISDIR(status.st_mode):
                raise self.error("a directory, not a file")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a terminal could wait for ever
                raise self.error("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise self.error(too_large)
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            raise self.error("no such file") from None
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror or error})") from error
        except ValueError as error:  # a NUL or a lone surrogate in the path
            raise self.error(f"not a path ({error})") from error
        sha256 = hashlib.sha256(data).hexdigest()
        if not data.startswith(b"\x1f\x8b"):
            return data, sha256
        content = bytearray()
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                while chunk := stream.read(2**20):
                    content += chunk
                    if len(content) > MAX_FILE_BYTES:
                        raise self.error(f"{too_large} when uncompressed")
        except EOFError:
            raise self.error("truncated gzip file", "copy or compress it again") from None
        except (OSError, zlib.error) as error:
            raise self.error(f"damaged gzip file ({error})", "copy or compress it again") from error
        return bytes(content), sha256

    def records(self, data: bytes) -> list[_Record]:
        """Returns the records, their values unchecked, out of uncompressed bytes."""
        needed = 2 * len(data) + BYTES_A_LIST * (data.count(b"[") + data.count(b"{")) + BYTES_A_VALUE * data.count(b",")
        if needed > (free := memory.available_memory_bytes()):  # a small gzip file may hold a billion lists
            found = f"reading it may take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free"
            raise self.error(found, "give a part of it, or use a larger machine")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # The codec counts from after a byte order mark.
            offset = error.start + len(data) - len(error.object)
            found = f"not UTF-8, {error.reason} at byte {offset:,} ({data[offset]:#04x})"
            raise self.error(found, "save it as UTF-8, or copy it again if it was cut") from None
        values, end = [], 0
        try:
            while start := _VALUE_START.search(text, end):
                value, end = _DECODER.raw_decode(text, start.start())
                values.append(value)
        except RecursionError:
            raise self.error("JSON nested too deeply to read") from None
        except json.JSONDecodeError as error:
            started = text.lstrip().startswith("[") and not values
            cut = started and not (text.rstrip().endswith("]") and text[error.pos :].strip())
            state = "truncated" if cut or error.msg.startswith("Unterminated string") else "invalid"
            offset = len(text[: error.pos].encode()) + 3 * data.startswith(codecs.BOM_UTF8)
            place = f"line {error.lineno}, column {error.colno} (byte {offset:,})"
            raise self.error(f"{state} JSON, {error.msg.removesuffix(' at')} at {place}") from None
        if not values:
            raise self.error("empty file")
        if self.name != "sample":
            if len(values) > 1:
                raise self.error(f"{len(values):,} JSON values in a row, not one list")
            values = values[0]
            if not isinstance(values, list):
                raise self.error(f"{_describe(values)}, not a list")
            if not values:
                raise self.error("an empty list")
        return [_Record(value, index, self) for index, value in enumerate(values)]


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of a file, and the errors that name it."""

    value: Any
    index: int
    file: _File

    def error(self, field: str, found: str, remedy: str = "") -> UserError:
        where = f"{self.file.field}, record {self.index} (counting from 0)" + (f", {field}" if field else "")
        return UserError(where, found, remedy or f"correct it in {quoted(self.file.path, 300)}")

    def misshapen(self) -> UserError:
        """The error for a value that is no record of this dataset; it recognises those of the others."""
        value, name, other = self.value, self.file.name, ""
        if isinstance(value, dict) and "conversations" in value:
            other = "sharegpt"
        elif isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
            other = "asc24"
        remedy = f"use dataset={other} for this file" if other else f"write it as {_RECORDS[name]}"
        return self.error("", f"{_describe(value)}, not {_RECORDS[name]}", remedy)

    def text(self, field: str, value: Any) -> str:
        """Returns ``value`` if it is text that can be encoded; it may be empty."""
        if not isinstance(value, str):
            raise self.error(field, f"{_describe(value)} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start:,} is the lone surrogate {value[error.start]!a}"
            raise self.error(field, found) from None
        return value

    def length(self, field: str, value: Any) -> int:
        """Returns ``value`` if it is a number of tokens; true, 5.0 and "5" are not."""
        if type(value) is not int or not 1 <= value <= MAX_LENGTH:
            raise self.error(field, f"{_describe(value)} is not a whole number from 1 to {MAX_LENGTH:,}")
        return value


def _wanted(name: str) -> str:
    return f"a JSON list of {_RECORDS[name]}"


def _describe(value: Any) -> str:
    """Returns a JSON value as it can stand inside an error line, its type visible."""
    if isinstance(value, dict):
        return f"an object with the keys {quoted(list(value)[:4])}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of length {len(value):,}"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if isinstance(value, _HugeInteger):
        return f"an integer of {value.digits:,} digits"
    return f"the float {value!r}" if isinstance(value, float) else json.dumps(value)
