"""Parquet files, and the Arrow files of Hugging Face data sets, read with pyarrow alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import one_line
from harness.workload.stored_file import Record, StoredFile

PARQUET, ARROW, STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"  # what their files begin with
ROWS = 1024  # read at a time
UNCHECKED = 2**24  # bytes of a table that are read without asking for memory
BYTES_A_VALUE = 60  # in memory, beside its text


@dataclass(frozen=True, slots=True)
class ArrowFile(StoredFile):
    """A table by columns; a record is a row, by column."""

    def records(self, data: bytes, columns: Sequence[str] = ()) -> list[Record]:
        """Returns the rows out of the file's bytes, each with those columns alone that ``columns`` asks for.

        A table may be much larger than its file: it is read in parts, as far as the memory holds them.
        """
        import pyarrow as pa

        found: list[Record] = []
        if not data:
            raise self.error("empty file")
        if not data.startswith((PARQUET, ARROW, STREAM)):
            raise self.error("no Parquet or Arrow file")
        try:
            names, batches = _table(data, columns)
            pending = 0
            for batch in map(_plain_columns, batches):
                pending += batch.nbytes + BYTES_A_VALUE * batch.num_rows * batch.num_columns
                if pending > UNCHECKED:
                    self.check_memory(4 * pending)
                    pending = 0
                found += [Record(_plain(row), len(found) + at, self) for at, row in enumerate(batch.to_pylist())]
        except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            said = one_line(str(error), 150)
            raise self.error(f"a damaged table ({said})", "write or copy it again") from None
        if not found:
            raise self.error("a table without rows")
        # The first says which columns there are, for an error that names them; the others are not read.
        return [Record(dict.fromkeys(names) | found[0].value, 0, self), *found[1:]]


def _table(data: bytes, columns: Sequence[str]) -> tuple[list[str], Iterator[Any]]:
    """Returns a table's column names, and its parts; read in this thread, since the process may be forked later."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    source = pa.BufferReader(data)
    wanted = set(columns) | {column.split(".")[0] for column in columns}
    if data.startswith(PARQUET):
        table = parquet.ParquetFile(source)
        names = table.schema_arrow.names
        chosen = [name for name in dict.fromkeys(names) if name in wanted]
        return names, table.iter_batches(ROWS, columns=chosen or names[:1], use_threads=False)
    options = ipc.IpcReadOptions(use_threads=False)
    reader: Any
    batches: Iterator[Any]
    if data.startswith(ARROW):
        reader = ipc.open_file(source, options=options)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = ipc.open_stream(source, options=options)
        batches = iter(reader)
    names = reader.schema.names
    chosen = [name for name in dict.fromkeys(names) if name in wanted]
    return names, (batch.select(chosen or names[:1]) for batch in batches)


def _plain_columns(batch: Any) -> Any:
    """Returns a part of a table whose texts take as many bytes as they seem to; raises TypeError where that cannot be.

    Dictionaries and views may name one long text for a million rows.
    """
    import pyarrow as pa

    batch.validate(full=True)  # a damaged file may point anywhere
    columns = []
    for column in batch.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string_view(kind) or (kind is not column.type and _is_text(kind)):
            column = column.cast(pa.string())  # of 2 GiB at most
        elif kind is not column.type or _repeats(kind):
            raise TypeError(f"a column of type {column.type} cannot be read")
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _repeats(kind: Any) -> bool:
    """Returns whether arrays of a type may hold more than they have bytes for, in themselves or in what is nested."""
    import pyarrow as pa

    types = pa.types
    views = (types.is_string_view, types.is_binary_view, types.is_list_view, types.is_large_list_view)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind) or any(view(kind) for view in views):
        return True
    return types.is_nested(kind) and any(_repeats(kind.field(number).type) for number in range(kind.num_fields))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with whole numbers for floats: pandas makes floats of a column that has gaps, NaN of the gaps."""
    return {name: _number(value) if isinstance(value, float) else value for name, value in row.items()}


def _number(value: float) -> float | int | None:
    return None if math.isnan(value) else int(value) if value.is_integer() else value
