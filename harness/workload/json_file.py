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
from harness.workload.records import MAX_LENGTH

BYTES_A_LIST, BYTES_A_VALUE = 180, 80  # in memory, of a list or object in a file, and of a value in one (measured)
MAX_FILE_BYTES = 2**31  # stored or uncompressed; the whole file is held in memory
_VALUE_START = re.compile(r"[^ \t\n\r]")


@dataclass(frozen=True, slots=True)
class _HugeInteger:
    """An integer that is certainly no length; ``int()`` refuses those of more than 4,300 digits."""

    digits: int


def _parse_int(literal: str) -> int | _HugeInteger:
    return int(literal) if len(literal) <= 20 else _HugeInteger(len(literal.lstrip("-")))


_DECODER = json.JSONDecoder(parse_int=_parse_int)


class Misshapen(UserError):
    """A record is none of this format; ``value`` is what stands there."""

    def __init__(self, field: str, found: str, remedy: str, value: Any) -> None:
        super().__init__(field, found, remedy)
        self.value = value


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A file of records, and the errors that name it.

    Attributes:
        field: the key that chose the file.
        record: what one record looks like.
        remedy: the way out of an error that has no better one.
        in_a_row: whether the records stand one after the other, as in JSON lines, in place of one list.
        shipped: whether the file comes with the harness: ``remedy`` is then the way out of every error.
    """

    path: str
    field: str
    record: str
    remedy: str
    in_a_row: bool = False
    shipped: bool = False

    def error(self, found: str, remedy: str = "") -> UserError:
        """Returns the error for this file: what was found in it, and a remedy if there is a better one than its own."""
        return UserError(
            self.field, f"{found}: {quoted(self.path, 300)}", self.remedy if self.shipped else remedy or self.remedy
        )

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

    def records(self, data: bytes) -> list[Record]:
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
        if not self.in_a_row:
            if len(values) > 1:
                raise self.error(f"{len(values):,} JSON values in a row, not one list")
            values = values[0]
            if not isinstance(values, list):
                raise self.error(f"{describe(values)}, not a list")
            if not values:
                raise self.error("an empty list")
        return [Record(value, index, self) for index, value in enumerate(values)]


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, and the errors that name it."""

    value: Any
    index: int
    file: JsonFile

    def error(self, field: str, found: str, remedy: str = "") -> UserError:
        """Returns the error for ``field`` of this record, or for all of it where that is empty."""
        where = f"{self.file.field}, record {self.index} (counting from 0)" + (f", {field}" if field else "")
        return UserError(where, found, remedy or f"correct it in {quoted(self.file.path, 300)}")

    def misshapen(self) -> Misshapen:
        """Returns the error for a value that is no record of the file's format."""
        wrong = self.error("", f"{describe(self.value)}, not {self.file.record}", f"write it as {self.file.record}")
        return Misshapen(wrong.field, wrong.found, wrong.remedy, self.value)

    def text(self, field: str, value: Any) -> str:
        """Returns ``value`` if it is text that can be encoded; it may be empty."""
        if not isinstance(value, str):
            raise self.error(field, f"{describe(value)} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start:,} is the lone surrogate {value[error.start]!a}"
            raise self.error(field, found) from None
        return value

    def length(self, field: str, value: Any) -> int:
        """Returns ``value`` if it is a number of tokens; true, 5.0 and "5" are not."""
        if type(value) is not int or not 1 <= value <= MAX_LENGTH:
            raise self.error(field, f"{describe(value)} is not a whole number from 1 to {MAX_LENGTH:,}")
        return value


def describe(value: Any) -> str:
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
