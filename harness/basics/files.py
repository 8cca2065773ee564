"""Writing files so that a crash or a full disk leaves them whole, and the values that go into them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON knows it: enums by value, paths as text, nan and infinity as None."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "items"):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | array):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, torch
        return plain(value.tolist())
    return str(value)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Returns ``value`` as UTF-8 JSON which holds no line separator but those of ``indent``."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=plain)
    text = re.sub("[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    # A lone surrogate has no UTF-8 form; Python's backslash escape of it is also JSON's.
    return text.encode("utf-8", errors="backslashreplace")


def yaml_bytes(config: dict[str, Any]) -> bytes:
    """Returns a resolved config (plain data) as YAML that ``OmegaConf.load`` reads back to the same values."""
    from omegaconf import OmegaConf

    literal = json.loads(json.dumps(config).replace("${", "\\\\${"))  # whatever is left of "${" is plain text
    return OmegaConf.to_yaml(OmegaConf.create(literal)).encode("utf-8", errors="backslashreplace")


def cannot_write(path: str | Path, error: Exception) -> UserError:
    """Returns the error to raise when ``path`` could not be written."""
    remedy = "check this path, or set results_dir to another directory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space, then run again"
    return UserError(str(path), f"cannot be written: {getattr(error, 'strerror', None) or error}", remedy)


def can_write(directory: Path) -> Path:
    """Returns the nearest directory that is there, ``directory`` or one above it, once a file could be made in it.

    The file has no name and leaves nothing behind.

    Raises:
        OSError: none can be made there, or what is there is no directory.
    """
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        return place


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of ``data``; what a failed write left behind is taken back: no torn line stays.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    view = memoryview(data)
    size = os.fstat(descriptor).st_size
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        if len(view) < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
        raise


def replace(path: Path, data: bytes) -> None:
    """Puts ``data`` in place of ``path``: a reader sees the old file or the new one, whole.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def mend_last_line(path: Path, is_whole: Callable[[bytes], bool] | None = None) -> None:
    """Mends the last line that a process left which died while it wrote: it is cut off, or ended if it is whole.

    Args:
        path: nothing happens where there is no such file.
        is_whole: says of a line whether nothing but its end is missing; None for lines that cannot tell.

    Raises:
        OSError: the file cannot be read or written.
    """
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
        if end == size:
            return
        file.seek(end)
        if is_whole is not None and is_whole(file.read()):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(end)


def leads(path: Path, descriptor: int | None = None) -> bool:
    """Returns whether ``path`` leads somewhere, to an open file if one is given, which may have been moved."""
    try:
        found = os.stat(path)
        return descriptor is None or os.path.samestat(found, os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # nobody knows; writing will tell


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a regular file; nothing when there is no such file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from enumerate(file, start=1)


def open_append(path: Path) -> int:
    """Returns a descriptor that appends to ``path``, made if missing; raises OSError. The caller closes it."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
