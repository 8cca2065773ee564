"""Parquet: one row a request."""

from __future__ import annotations

from harness.workload.arrow_file import ArrowFile
from harness.workload.formats.by_fields import FieldFormat
from harness.workload.stored_file import StoredFile


class Parquet(FieldFormat):
    """Tables by columns, read with pyarrow."""

    name = "parquet"
    record = "a row with the columns prompt and output_len"
    wanted = "a Parquet file"
    what = "Parquet"

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(ArrowFile, path)


FORMAT = Parquet()
