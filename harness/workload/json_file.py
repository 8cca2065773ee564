"""JSON read record by record, so that a large or a broken file is told in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from harness.workload.stored_file import HugeInteger, Record, StoredFile, describe

BYTES_A_LIST, BYTES_A_VALUE = 180, 80  # in memory, of a list or object in a file, and of a value in one (measured)
VALUE_START = re.compile(r"[^ \t\n\r]")


def _parse_int(literal: str) -> int | HugeInteger:
    return int(literal) if len(literal) <= 20 else HugeInteger(len(literal.lstrip("-")))


DECODER = json.JSONDecoder(parse_int=_parse_int)


class Layout(Enum):
    """How the records stand in a file: in one list, one after the other as in JSON lines, or either."""

    listed = "listed"
    in_a_row = "in_a_row"
    either = "either"


@dataclass(frozen=True, slots=True)
class JsonFile(StoredFile):
    """A file of JSON records."""

    layout: Layout = Layout.listed

    def records(self, data: bytes, columns: Sequence[str] = ()) -> list[Record]:
        """Returns the records, their values unchecked, out of uncompressed bytes; ``columns`` are all."""
        lists = data.count(b"[") + data.count(b"{")
        self.check_memory(2 * len(data) + BYTES_A_LIST * lists + BYTES_A_VALUE * data.count(b","))
        values, lines = self._values(data)
        if not values:
            raise self.error("empty file")
        layout = self.layout
        if layout is Layout.either:
            layout = Layout.listed if len(values) == 1 and isinstance(values[0], list) else Layout.in_a_row
        if layout is Layout.in_a_row:
            return [
                Record(value, index, self, line) for index, (value, line) in enumerate(zip(values, lines, strict=True))
            ]
        if len(values) > 1:
            raise self.error(f"{len(values):,} JSON values in a row, not one list")
        if not isinstance(values[0], list):
            raise self.error(f"{describe(values[0])}, not a list")
        if not values[0]:
            raise self.error("an empty list")
        return [Record(value, index, self) for index, value in enumerate(values[0])]

    def _values(self, data: bytes) -> tuple[list[Any], list[int]]:
        """Returns the JSON values that stand one after the other, and the lines, from 1, that they begin in."""
        text = self.text(data)
        values: list[Any] = []
        lines: list[int] = []
        end, line, counted = 0, 1, 0
        try:
            while start := VALUE_START.search(text, end):
                line, counted = line + text.count("\n", counted, start.start()), start.start()
                value, end = DECODER.raw_decode(text, start.start())
                values.append(value)
                lines.append(line)
        except RecursionError:
            raise self.error("JSON nested too deeply to read") from None
        except json.JSONDecodeError as error:
            started = text.lstrip().startswith("[") and not values
            cut = started and not (text.rstrip().endswith("]") and text[error.pos :].strip())
            state = "truncated" if cut or error.msg.startswith("Unterminated string") else "invalid"
            place = f"line {error.lineno}, column {error.colno} (byte {self.offset(data, text, error.pos):,})"
            raise self.error(f"{state} JSON, {error.msg.removesuffix(' at')} at {place}") from None
        return values, lines
