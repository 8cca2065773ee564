"""The challenge's file: a list of ``[prompt, prompt_len, output_len]``."""

from __future__ import annotations

from typing import Any

from harness.config.schema import DatasetConfig
from harness.workload.formats.base import FileFormat
from harness.workload.records import Request
from harness.workload.stored_file import Record


class Asc24(FileFormat):
    """A prompt, its length in the committee's tokens, which is never trusted, and how many to generate."""

    name = "asc24"
    record = "[prompt, prompt_len, output_len]"

    def parse(self, record: Record, dataset: DatasetConfig) -> Request:
        """Returns the request of one record."""
        return request_of(record, record.value)

    def recognises(self, value: Any) -> bool:
        """Returns whether ``value`` is a list of three that begins with text."""
        return isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)


def request_of(record: Record, fields: Any) -> Request:
    """Returns the request of a record with the fields prompt, prompt_len and output_len; raises UserError."""
    if not isinstance(fields, list) or len(fields) != 3:
        raise record.misshapen()
    prompt = record.prompt("prompt", fields[0])
    prompt_len = record.length("prompt_len", fields[1])
    return Request(record.index, prompt, record.length("output_len", fields[2]), prompt_len)


FORMAT = Asc24()
