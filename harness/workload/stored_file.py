"""A file of the user's, read whole: what it holds, its fingerprint, and errors that name it."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.basics.errors import UserError, quoted
from harness.machine import memory
from harness.workload.records import MAX_LENGTH

MAX_FILE_BYTES = 2**31  # stored or uncompressed; the whole file is held in memory


@dataclass(frozen=True, slots=True)
class HugeInteger:
    """An integer that is certainly no length; ``int()`` refuses those of more than 4,300 digits."""

    digits: int


@dataclass(frozen=True, slots=True)
class StoredFile(ABC):
    """A file of records, and the errors that name it.

    Attributes:
        field: the key that chose the file.
        record: what one record looks like.
        remedy: the way out of an error that has no better one.
        shipped: whether the file comes with the harness: ``remedy`` is then the way out of every error.
        named: what stands before a record's place in an error: the file's name, where there are several.
        written: whether all values in it are text, numbers too, and one that is missing is empty.
    """

    written: ClassVar[bool] = False

    path: str
    field: str
    record: str
    remedy: str
    shipped: bool = False
    named: str = ""

    @abstractmethod
    def records(self, data: bytes, columns: Sequence[str] = ()) -> list[Record]:
        """Returns the records, their values unchecked, out of uncompressed bytes.

        Args:
            columns: names of the fields that are asked for, for a table that has many.
        """

    def error(self, found: str, remedy: str = "") -> UserError:
        """Returns the error for this file: what was found in it, and a remedy if there is a better one than its own."""
        return UserError(
            self.field, f"{found}: {quoted(self.path, 300)}", self.remedy if self.shipped else remedy or self.remedy
        )

    def read(self) -> tuple[bytes, str]:
        """Returns the uncompressed bytes, and the SHA-256 of the stored ones."""
        data = self.stored()
        return self.unpacked(data), hashlib.sha256(data).hexdigest()

    def stored(self) -> bytes:
        """Returns the bytes as they are in the file; raises UserError."""
        try:
            status = os.stat(self.path)
            if stat.S_ISDIR(status.st_mode):
                raise self.error("a directory, not a file")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a terminal could wait for ever
                raise self.error("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise self.error(f"more than {MAX_FILE_BYTES:,} bytes")
            return Path(self.path).read_bytes()
        except FileNotFoundError:
            raise self.error("no such file") from None
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror or error})") from error
        except ValueError as error:  # a NUL or a lone surrogate in the path
            raise self.error(f"not a path ({error})") from error

    def unpacked(self, data: bytes) -> bytes:
        """Returns the content of stored bytes, which may be gzip; raises UserError."""
        if not data.startswith(b"\x1f\x8b"):
            return data
        content = bytearray()
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                while chunk := stream.read(2**20):
                    content += chunk
                    if len(content) > MAX_FILE_BYTES:
                        raise self.error(f"more than {MAX_FILE_BYTES:,} bytes when uncompressed")
        except EOFError:
            raise self.error("truncated gzip file", "copy or compress it again") from None
        except (OSError, zlib.error) as error:
            raise self.error(f"damaged gzip file ({error})", "copy or compress it again") from error
        return bytes(content)

    def check_memory(self, needed: int) -> None:
        """Raises UserError where so many bytes are not free: a small file may hold a billion lists."""
        if needed > (free := memory.available_memory_bytes()):
            found = f"reading it may take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free"
            raise self.error(found, "give a part of it, or use a larger machine")

    def text(self, data: bytes) -> str:
        """Returns ``data`` decoded, without a byte order mark; raises UserError."""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # The codec counts from after a byte order mark.
            offset = error.start + len(data) - len(error.object)
            found = f"not UTF-8, {error.reason} at byte {offset:,} ({data[offset]:#04x})"
            raise self.error(found, "save it as UTF-8, or copy it again if it was cut") from None

    def offset(self, data: bytes, text: str, position: int) -> int:
        """Returns which byte of ``data`` the character of ``text`` at ``position`` begins at."""
        return len(text[:position].encode()) + 3 * data.startswith(codecs.BOM_UTF8)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, and the errors that name it.

    Attributes:
        index: among those of the file, from 0.
        line: where it begins, from 1, in a file that people count in lines; 0 elsewhere.
    """

    value: Any
    index: int
    file: StoredFile
    line: int = 0

    @property
    def place(self) -> str:
        """Where it is, for an error message."""
        place = f"line {self.line:,}" if self.line else f"record {self.index} (counting from 0)"
        return f"{self.file.named}, {place}" if self.file.named else place

    def error(self, field: str, found: str, remedy: str = "") -> UserError:
        """Returns the error for ``field`` of this record, or for all of it where that is empty."""
        where = f"{self.file.field}, {self.place}" + (f", {field}" if field else "")
        return UserError(where, found, remedy or f"correct it in {quoted(self.file.path, 300)}")

    def misshapen(self) -> UserError:
        """Returns the error for a value that is no record of the file's format."""
        return self.error("", f"{describe(self.value)}, not {self.file.record}", f"write it as {self.file.record}")

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

    def prompt(self, field: str, value: Any) -> str:
        """Returns ``value`` if it is text, and there is some."""
        if not self.text(field, value):
            raise self.error(field, "the string is empty")
        return str(value)

    def length(self, field: str, value: Any) -> int:
        """Returns ``value`` if it is a number of tokens; true, 5.0 and "5" are not."""
        if type(value) is not int or not 1 <= value <= MAX_LENGTH:
            raise self.error(field, f"{describe(value)} is not a whole number from 1 to {MAX_LENGTH:,}")
        return value


def describe(value: Any) -> str:
    """Returns a value as it can stand inside an error line, its type visible."""
    if isinstance(value, dict):
        return f"an object with the keys {quoted(list(value)[:4])}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of length {len(value):,}"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if isinstance(value, HugeInteger):
        return f"an integer of {value.digits:,} digits"
    if isinstance(value, float):
        return f"the float {value!r}"
    # Tables have values that JSON has no words for: bytes, dates, decimals.
    return json.dumps(value) if value is None or isinstance(value, bool | int) else quoted(value)
