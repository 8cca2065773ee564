"""``--version``: which harness this is, and on what it stands."""

from __future__ import annotations

import platform
import textwrap

from harness import __version__
from harness.machine.snapshot import code_state, package_versions

NAME = "deepspeed-llama-harness"
WIDTH = 80


def version() -> str:
    """Returns the harness with its commit, Python, and the packages that decide speed and results, on 80 columns."""
    lines = [f"{NAME} {__version__}"]
    if (state := code_state()) is not None:
        lines[0] += f", commit {state['commit'][:12]}" + (", changed since" if state["dirty"] else "")
    lines.append(f"Python {platform.python_version()}")
    lines.append(textwrap.fill(", ".join(f"{name} {number}" for name, number in package_versions().items()), WIDTH))
    return "\n".join(lines)
