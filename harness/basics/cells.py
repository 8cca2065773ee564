"""Text made safe for a CSV cell."""

from __future__ import annotations

import json
import math
from typing import Any

from harness.basics.files import plain

CELL_LIMIT = 1000
FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width


def cell_text(name: str, value: Any) -> str:
    """Returns one cell: unknown is empty, counts are exact, other numbers have 6 digits and times 9.

    Text stays on one line, and none starts a formula in a spreadsheet.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
        return format(value, ".9g" if name.endswith("_s") and not name.endswith("_per_s") else ".6g")
    if isinstance(value, int):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(plain(value))
    text = "".join(char if char.isprintable() else " " for char in text).strip()[:CELL_LIMIT]
    return "'" + text if text.startswith(FORMULA_STARTS) else text
