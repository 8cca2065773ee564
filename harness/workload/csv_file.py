"""CSV as spreadsheets and pandas write it: a header, any of four delimiters, quoted text with line ends in it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.basics.errors import quoted
from harness.workload.stored_file import MAX_FILE_BYTES, Record, StoredFile

DELIMITERS = ",;\t|"
SEPARATOR = re.compile(r"(?i:sep)=([,;\t|])\r?\n")  # Excel's own way to say it
HEADER_CHARACTERS = 100_000  # enough to hold it
BYTES_A_CELL = 100  # in memory, beside its text


@dataclass(frozen=True, slots=True)
class CsvFile(StoredFile):
    """A table whose first row names its columns; a record is a row, by column."""

    written: ClassVar[bool] = True

    def records(self, data: bytes, columns: Sequence[str] = ()) -> list[Record]:
        """Returns the rows out of uncompressed bytes; those without anything in them are passed over.

        Args:
            columns: names that the header may have; the delimiter is the one that makes it have one.
        """
        cells = max(data.count(delimiter.encode()) for delimiter in DELIMITERS) + data.count(b"\n")
        self.check_memory(3 * len(data) + BYTES_A_CELL * cells)
        text, first, given = self.text(data), 1, None
        if said := SEPARATOR.match(text):
            given, first, text = said[1], 2, text[said.end() :]
        delimiter = given or delimiter_of(text, columns)
        rows = self._rows(text, delimiter, first)
        header = [name.strip() for name in next(rows, (0, []))[1]]
        if not any(header):
            raise self.error("empty file")
        found: list[Record] = []
        for line, row in rows:
            if len(row) != len(header):
                wrong = Record(row, len(found), self, line)
                cells_there = f"{len(row)} cells, but the header has {len(header)}: {quoted(header)}"
                raise wrong.error("", cells_there, "quote a text that holds the delimiter or a line end")
            found.append(Record(dict(zip(header, row, strict=True)), len(found), self, line))
        if not found:
            raise self.error("no row below the header")
        return found

    def _rows(self, text: str, delimiter: str, line: int) -> Iterator[tuple[int, list[str]]]:
        """Yields the rows that have text in them, each with the line, counted from ``line``, that it begins in."""
        csv.field_size_limit(MAX_FILE_BYTES - 1)
        rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
        begins = line
        try:
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield begins, row
                begins = line + rows.line_num
        except csv.Error as error:
            known = {"end of data": "a quote is never closed", "new-line": "a carriage return outside quotes"}
            said = next((words for part, words in known.items() if part in str(error)), str(error))
            raise Record(None, 0, self, begins).error("", f"not CSV ({said})") from None


def header_of(text: str, delimiter: str) -> list[str]:
    """Returns the names in the first row that has any; none where it is no row."""
    try:
        rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
        return next(([cell.strip() for cell in row] for row in rows if any(map(str.strip, row))), [])
    except csv.Error:
        return []


def delimiter_of(text: str, columns: Sequence[str]) -> str:
    """Returns what parts the cells: what makes the header have most of ``columns``, then most names at all."""
    headers = {delimiter: header_of(text[:HEADER_CHARACTERS], delimiter) for delimiter in DELIMITERS}
    return max(DELIMITERS, key=lambda one: (len(set(headers[one]) & set(columns)), len(headers[one])))
