"""CSV with a header: one row a request."""

from __future__ import annotations

from harness.workload.csv_file import CsvFile
from harness.workload.formats.by_fields import FieldFormat
from harness.workload.stored_file import StoredFile


class Csv(FieldFormat):
    """Tables as spreadsheets and pandas write them, plain or gzip."""

    name = "csv"
    record = "a row with the columns prompt and output_len"
    wanted = "a CSV file whose header names its columns"
    what = "CSV"

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(CsvFile, path)


FORMAT = Csv()
