"""Plain text: one prompt a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.config.schema import DatasetConfig
from harness.workload.formats.base import StoredFormat
from harness.workload.records import Request
from harness.workload.stored_file import Record, StoredFile


@dataclass(frozen=True, slots=True)
class TextFile(StoredFile):
    """A file of lines."""

    def records(self, data: bytes, columns: Sequence[str] = ()) -> list[Record]:
        """Returns the lines that have text in them, without their ends."""
        self.check_memory(3 * len(data) + 150 * data.count(b"\n"))
        # Only these two end a line: str.splitlines() would cut a prompt at a form feed or U+2028.
        lines = [line.removesuffix("\r") for line in self.text(data).split("\n")]
        kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not kept:
            raise self.error("empty file")
        return [Record(line, index, self, number) for index, (number, line) in enumerate(kept)]


class Text(StoredFormat):
    """Lines, plain or gzip; blank ones are passed over."""

    name = "text"
    optional: ClassVar[Sequence[str]] = ("output_len",)
    record = "a prompt"
    wanted = "a text file with one prompt a line"
    what = "plain text"
    takes_any_text = True

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(TextFile, path)

    def requests(self, records: Sequence[Record], dataset: DatasetConfig) -> Iterable[Request | None]:
        """Yields a request a line."""
        for record in records:
            yield Request(record.index, record.prompt("", record.value), None)


FORMAT = Text()
