"""The shipped prompts: JSON lines with the fields of ``asc24``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from harness.config.schema import DatasetConfig
from harness.workload.formats.asc24 import request_of
from harness.workload.formats.base import FileFormat
from harness.workload.json_file import JsonFile, Layout
from harness.workload.records import Request
from harness.workload.stored_file import Record, StoredFile

SAMPLE_PATH = Path(__file__).resolve().parents[1] / "data" / "sample.jsonl"
FIELDS = ("prompt", "prompt_len", "output_len")


class Sample(FileFormat):
    """One file, which comes with the harness."""

    name = "sample"
    required: ClassVar[Sequence[str]] = ()
    record = '{"prompt": ..., "prompt_len": ..., "output_len": ...}'

    def path(self, dataset: DatasetConfig) -> str:
        """Returns the shipped file, whatever the directory of the run."""
        return str(SAMPLE_PATH)

    def file(self, path: str) -> StoredFile:
        """Returns the shipped file, unread."""
        remedy = "restore harness/workload/data/sample.jsonl from the repository"
        return JsonFile(path, f"dataset={self.name}", self.record, remedy, shipped=True, layout=Layout.in_a_row)

    def parse(self, record: Record, dataset: DatasetConfig) -> Request:
        """Returns the request of one line."""
        value = record.value
        return request_of(record, [value.get(field) for field in FIELDS] if isinstance(value, dict) else value)


FORMAT = Sample()
