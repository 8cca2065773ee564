"""What a dataset format is: the keys it takes, and how its requests are read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig
from harness.workload.json_file import JsonFile, Record
from harness.workload.records import Request, Workload


class Format(ABC):
    """One ``dataset=`` option.

    Attributes:
        name: of the option.
        required: keys of ``conf/dataset`` that must be given.
        optional: keys that may be given; the other ones are refused. ``num_samples`` may be given always.
        max_samples: bound of ``num_samples``; None where the file is the bound.
    """

    name: ClassVar[str]
    required: ClassVar[Sequence[str]] = ()
    optional: ClassVar[Sequence[str]] = ()
    max_samples: ClassVar[int | None] = None

    def takes(self, key: str) -> bool:
        """Returns whether the key may be given."""
        return key in self.required or key in self.optional

    @property
    def settings(self) -> list[str]:
        """The keys that settle, beside the file and how much of it is taken, what is asked of the model."""
        return [key for key in (*self.required, *self.optional) if key not in ("path", "num_samples")]

    @property
    def makes_requests(self) -> bool:
        """Whether there is no file, and so any number of requests, which has to be given."""
        return "num_samples" in self.required

    @property
    def wanted(self) -> str:
        """What ``dataset.path`` should name, for an error message."""
        return "a file"

    @abstractmethod
    def read(self, dataset: DatasetConfig) -> Workload:
        """Reads and checks the requests; the keys of ``dataset`` have been checked.

        Raises:
            UserError: the file cannot be read, or a record is wrong.
        """

    def recognises(self, value: Any) -> bool:
        """Returns whether a record of a file given with another ``dataset=`` option is one of this format."""
        return False

    def none_usable(self, workload: Workload, found: str) -> UserError:
        """Returns the error for a workload of which nothing is left."""
        return UserError(f"dataset={self.name}", found)


class FileFormat(Format):
    """A format of JSON files: by default one list of records, in the file that ``dataset.path`` names.

    Attributes:
        record: what one record looks like, for error messages.
        records: what the records are called there.
    """

    required: ClassVar[Sequence[str]] = ("path",)
    record: ClassVar[str]
    records: ClassVar[str] = "records"

    @abstractmethod
    def parse(self, record: Record, dataset: DatasetConfig) -> Request | None:
        """Returns the request of one record; None where it is to be left out and counted.

        Raises:
            UserError: the record is wrong: ``record.error(...)``, or ``record.misshapen()`` for another shape.
        """

    @property
    def wanted(self) -> str:
        """What ``dataset.path`` should name, for an error message."""
        return f"a JSON list of {self.record}"

    def file(self, path: str) -> JsonFile:
        """Returns the file at ``path``, unread."""
        return JsonFile(path, "dataset.path", self.record, f"give the path of {self.wanted}")

    def path(self, dataset: DatasetConfig) -> str:
        """Returns which file is read."""
        return os.path.expanduser(dataset.path or "")

    def read(self, dataset: DatasetConfig) -> Workload:
        """Reads the file; all of it is checked, even when few samples are taken."""
        path = self.path(dataset)
        file = self.file(path)
        data, sha256 = file.read()
        requests: list[Request] = []
        left_out = 0
        for request in [self.parse(record, dataset) for record in file.records(data)]:
            if len(requests) == dataset.num_samples:
                break
            if request is None:
                left_out += 1
            else:
                requests.append(replace(request, index=len(requests)))
        if not requests:
            raise file.error(f"none of the {left_out:,} {self.records} has a prompt and a reply")
        if dataset.num_samples is not None and len(requests) < dataset.num_samples:
            raise UserError(
                "dataset.num_samples",
                f"{dataset.num_samples:,} asked for, but {quoted(path, 300)} holds {len(requests):,}"
                + (f" ({left_out:,} more are not usable)" if left_out else ""),
                f"give a number from 1 to {len(requests)}, or null for all",
            )
        return Workload(self.name, requests, path, sha256, left_out)

    def none_usable(self, workload: Workload, found: str) -> UserError:
        """Returns the error for a file of which nothing is left."""
        return self.file(str(workload.path)).error(found)
