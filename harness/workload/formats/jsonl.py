"""JSON lines, or one list of JSON objects: one object a request."""

from __future__ import annotations

from typing import Any

from harness.workload.fields import PROMPTS
from harness.workload.formats.by_fields import FieldFormat
from harness.workload.json_file import JsonFile, Layout
from harness.workload.stored_file import StoredFile


class JsonLines(FieldFormat):
    """Objects with fields of any names, plain or gzip."""

    name = "jsonl"
    what = "JSONL"

    @property
    def wanted(self) -> str:
        """What ``dataset.path`` should name, for an error message."""
        return f"JSON lines of {self.record}"

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(JsonFile, path, layout=Layout.either)

    def recognises(self, value: Any) -> bool:
        """Returns whether ``value`` is an object with a prompt."""
        return isinstance(value, dict) and any(isinstance(value.get(name), str | list) for name in PROMPTS)


FORMAT = JsonLines()
