"""What a dataset format is: the keys it takes, and how its requests are read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig
from harness.workload.json_file import JsonFile, Layout
from harness.workload.lengths import Length, shuffled
from harness.workload.records import Request, Workload
from harness.workload.stored_file import Record, StoredFile


class Format(ABC):
    """One ``dataset=`` option.

    Attributes:
        name: of the option.
        required: keys of ``conf/dataset`` that must be given.
        optional: keys that may be given; the other ones are refused. ``num_samples`` may be given always.
        common: keys that a whole kind of formats takes, beside its ``optional`` ones.
        max_samples: bound of ``num_samples``; None where the file is the bound.
        what: what a file of it is called, where one is given with another option.
        takes_any_text: whether any text is one of it, so that a file of another format would be read without an error.
    """

    name: ClassVar[str]
    required: ClassVar[Sequence[str]] = ()
    optional: ClassVar[Sequence[str]] = ()
    common: ClassVar[Sequence[str]] = ()
    max_samples: ClassVar[int | None] = None
    what: ClassVar[str] = ""
    takes_any_text: ClassVar[bool] = False

    def takes(self, key: str) -> bool:
        """Returns whether the key may be given."""
        return key in (*self.required, *self.optional, *self.common)

    @property
    def settings(self) -> list[str]:
        """The keys that settle, beside the file and how much of it is taken, what is asked of the model."""
        keys = (*self.required, *self.optional, *self.common)
        return [key for key in keys if key not in ("path", "num_samples")]

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

    def lengthened(self, workload: Workload, dataset: DatasetConfig, lengths: Iterator[Length]) -> Workload:
        """Returns the workload with prompts of these lengths; of a format that takes ``input_len``."""
        return workload

    def recognises(self, value: Any) -> bool:
        """Returns whether the first JSON record of a file is surely one of this format."""
        return False

    def none_usable(self, workload: Workload, found: str) -> UserError:
        """Returns the error for a workload of which nothing is left."""
        return UserError(f"dataset={self.name}", found)


class StoredFormat(Format):
    """A format of files: records, in whatever ``dataset.path`` names.

    Attributes:
        record: what one record looks like, for error messages.
        records: what the records are called there.
    """

    required: ClassVar[Sequence[str]] = ("path",)
    common: ClassVar[Sequence[str]] = ("shuffle", "chat_template", "system_prompt", "seed")
    record: ClassVar[str]
    records: ClassVar[str] = "records"

    @abstractmethod
    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""

    def opened(self, kind: type[StoredFile], path: str, **settings: Any) -> StoredFile:
        """Returns the file at ``path``, unread, as one of a kind; ``settings`` are that kind's own."""
        return kind(path, "dataset.path", self.record, f"give the path of {self.wanted}", **settings)

    @abstractmethod
    def requests(self, records: Sequence[Record], dataset: DatasetConfig) -> Iterable[Request | None]:
        """Yields the request of each record; None for one that is to be left out and counted.

        Where a record says no ``output_len``, its request's is None, and ``dataset.output_len`` settles it.

        Raises:
            UserError: a record is wrong: ``record.error(...)``, or ``record.misshapen()`` for another shape.
        """

    def path(self, dataset: DatasetConfig) -> str:
        """Returns which file is read."""
        return os.path.expanduser(dataset.path or "")

    def columns(self, dataset: DatasetConfig) -> list[str]:
        """Returns the names of the fields that are asked for, for tables; none where there are no names."""
        return []

    def contents(self, path: str, dataset: DatasetConfig) -> tuple[list[Record], str]:
        """Returns all records, and the SHA-256 of the bytes that hold them; raises UserError."""
        file = self.file(path)
        data, sha256 = file.read()
        return file.records(data, self.columns(dataset)), sha256

    def read(self, dataset: DatasetConfig) -> Workload:
        """Reads the file; all of it is checked, even when few samples are taken."""
        path = self.path(dataset)
        records, sha256 = self.contents(path, dataset)
        requests: list[Request] = []
        left_out = 0
        found = list(self.requests(records, dataset))
        for request in shuffled(found, dataset.seed) if dataset.shuffle else found:
            if len(requests) == dataset.num_samples:
                break
            if request is None:
                left_out += 1
            else:
                requests.append(replace(request, index=len(requests)))
        if not requests:
            raise self.file(path).error(f"none of the {left_out:,} {self.records} has a prompt and a reply")
        if dataset.num_samples is not None and len(requests) < dataset.num_samples:
            raise UserError(
                "dataset.num_samples",
                f"{dataset.num_samples:,} asked for, but {quoted(path, 300)} holds {len(requests):,}"
                + (f" ({left_out:,} more are not usable)" if left_out else ""),
                f"give a number from 1 to {len(requests)}, or null for all",
            )
        return self.completed(Workload(self.name, requests, path, sha256, left_out), records)

    def completed(self, workload: Workload, records: Sequence[Record]) -> Workload:
        """Returns the workload with what else its file says; raises UserError."""
        return workload

    def none_usable(self, workload: Workload, found: str) -> UserError:
        """Returns the error for a file of which nothing is left."""
        return self.file(str(workload.path)).error(found)


class FileFormat(StoredFormat):
    """A format of JSON files whose records are read one by one: by default one list of them."""

    layout: ClassVar[Layout] = Layout.listed

    @abstractmethod
    def parse(self, record: Record, dataset: DatasetConfig) -> Request | None:
        """Returns the request of one record; None where it is to be left out and counted.

        Where the record says no ``output_len``, the request's is None, and ``dataset.output_len`` settles it.

        Raises:
            UserError: the record is wrong: ``record.error(...)``, or ``record.misshapen()`` for another shape.
        """

    @property
    def wanted(self) -> str:
        """What ``dataset.path`` should name, for an error message."""
        lines = "JSON lines" if self.layout is Layout.in_a_row else "a JSON list"
        return f"{lines} of {self.record}"

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(JsonFile, path, layout=self.layout)

    def requests(self, records: Sequence[Record], dataset: DatasetConfig) -> Iterable[Request | None]:
        """Yields the request of each record, as :meth:`parse` returns it."""
        return (self.parse(record, dataset) for record in records)
