"""``telemetry.csv``: a line a sample, written at once, so that a crash leaves what was seen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.basics.cells import cell_text
from harness.basics.files import mend_last_line, open_append, write_all


class Series:
    """The file, open for appending. Its first column is the time, empty before the clock's start.

    Args:
        path: made if missing; a last line that a crash tore is cut off.
        columns: of a new file; one that exists keeps its own: a run that is resumed may be on other devices.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        mend_last_line(path)
        header = _header(path)
        self.columns = header or list(columns)
        self._file: int = open_append(path)
        if not header:
            try:
                write_all(self._file, (",".join(columns) + "\n").encode())
            except OSError:
                self.close()
                raise

    def write(self, time_s: float | None, values: Mapping[str, object]) -> None:
        """Appends one line, of the values by column; raises OSError."""
        cells = ["" if time_s is None else f"{time_s:.3f}"]
        cells += [cell_text(name, values.get(name)) for name in self.columns[1:]]
        write_all(self._file, (",".join(cells) + "\n").encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _header(path: Path) -> list[str]:
    """Returns the columns of a file that exists; empty where there is none."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        line = file.readline().decode(errors="replace").rstrip("\n")
    return line.split(",") if line else []
