"""Pages of one file with charts: the code that draws them, and data that stays data."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError
from harness.basics.files import plain


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
