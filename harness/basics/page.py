"""Pages of one file with charts: the code that draws them, and data that stays data."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError
from harness.basics.files import plain, replace


@functools.cache
def bundle() -> str:
    """Returns the code of vega, vega-lite and vega-embed, about 0.9 MB, which leaves ``window.vegaEmbed``.

    Raises:
        UserError: the package that brings it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        found = "needs the package vl-convert-python, which is not installed"
        raise UserError("--html", found, "pip install vl-convert-python") from error
    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def inert(data: Any) -> str:
    """Returns JSON that ends no script element, whatever text is in it."""
    return json.dumps(plain(data), separators=(",", ":")).replace("<", "\\u003c")


def filled(template: Path, parts: Mapping[str, str]) -> str:
    """Returns the template with its ``{{name}}`` places filled, in one pass, so that no text is taken for a place."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template.read_text(encoding="utf-8"))


def writable(name: str, option: str = "--html") -> Path:
    """Returns the file to write a page to, or what else an ``option`` of a command names one for.

    Raises:
        UserError: no file can be made there.
    """
    remedy = "name a file in a directory that can be written"
    try:
        path = Path(os.path.realpath(name)) if name.strip() else None
        if path is None:
            raise UserError(option, "names no file", remedy)
        if path.exists() and not path.is_file():
            raise UserError(option, f"{name} is {'a directory' if path.is_dir() else 'not a plain file'}", remedy)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found = f"{name} cannot be written: {getattr(error, 'strerror', None) or error}"
        raise UserError(option, found, remedy) from error
    return path


def write(path: Path, page: str | bytes, option: str = "--html") -> None:
    """Writes to the file of :func:`writable`; raises UserError."""
    try:
        replace(path, page if isinstance(page, bytes) else page.encode("utf-8", errors="replace"))
    except UserError as error:
        raise UserError(option, f"{error.field} {error.found}", "free space, or name another file") from error
