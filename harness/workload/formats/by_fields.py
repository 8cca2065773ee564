"""Formats whose records have named fields, of which ``dataset.*_field`` picks prompt, output length and id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from harness.config.schema import DatasetConfig
from harness.workload.fields import Fields
from harness.workload.formats.base import StoredFormat
from harness.workload.records import Request
from harness.workload.stored_file import Record


class FieldFormat(StoredFormat):
    """A format whose fields may have any names."""

    optional: ClassVar[Sequence[str]] = ("output_len", "prompt_field", "output_len_field", "id_field")
    record: ClassVar[str] = '{"prompt": ..., "output_len": ...}'

    def columns(self, dataset: DatasetConfig) -> list[str]:
        """Returns the names of the fields that may be looked for."""
        return Fields.asked(dataset)

    def requests(self, records: Sequence[Record], dataset: DatasetConfig) -> Iterable[Request | None]:
        """Yields the request of each record."""
        fields = Fields.of(records, dataset)
        return (fields.request(record) for record in records)
