"""A Hugging Face data set in a local directory: what ``save_to_disk`` writes, or a folder of data files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from harness.config.schema import DatasetConfig
from harness.workload.arrow_file import ArrowFile
from harness.workload.csv_file import CsvFile
from harness.workload.formats.by_fields import FieldFormat
from harness.workload.hub_folder import DATA_FILE, files_of
from harness.workload.json_file import JsonFile, Layout
from harness.workload.stored_file import MAX_FILE_BYTES, Record, StoredFile

READERS: dict[str, tuple[type[StoredFile], dict[str, Any]]] = {
    "parquet": (ArrowFile, {}),
    "arrow": (ArrowFile, {}),
    "jsonl": (JsonFile, {"layout": Layout.either}),
    "json": (JsonFile, {"layout": Layout.either}),
    "csv": (CsvFile, {}),
}


class HuggingFace(FieldFormat):
    """The rows of one split, read with pyarrow and without the ``datasets`` package."""

    name = "huggingface"
    optional: ClassVar[Sequence[str]] = (*FieldFormat.optional, "split")
    record = "a row with the columns prompt and output_len"
    wanted = "the directory of a Hugging Face data set"
    what = "a Hugging Face data set"

    def file(self, path: str) -> StoredFile:
        """Returns the directory as errors name it; what is read are files in it."""
        return self.opened(ArrowFile, path)

    def contents(self, path: str, dataset: DatasetConfig) -> tuple[list[Record], str]:
        """Returns the rows of the split's files, in the order of their names, and the SHA-256 of all their bytes."""
        digest, total = hashlib.sha256(), 0
        records: list[Record] = []
        for data_file in files_of(path, dataset.split):
            file = self._of(data_file, path)
            stored = file.stored()
            digest.update(stored)
            data = file.unpacked(stored)
            total += len(data)
            if total > MAX_FILE_BYTES:
                raise self.file(path).error(f"more than {MAX_FILE_BYTES:,} bytes of data files")
            found = file.records(data, self.columns(dataset))
            records += [replace(record, index=len(records) + at) for at, record in enumerate(found)]
        return records, digest.hexdigest()

    def _of(self, path: Path, directory: str) -> StoredFile:
        """Returns a data file, unread."""
        match = DATA_FILE.fullmatch(path.name)
        kind, settings = READERS[match["kind"] if match else "arrow"]
        return self.opened(kind, str(path), named=os.path.relpath(path, directory), **settings)


FORMAT = HuggingFace()
