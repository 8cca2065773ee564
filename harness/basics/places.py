"""Where the harness lies: in a checkout, or where pip has installed it, with ``conf/`` inside the package."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKED = ROOT / "harness" / "conf"
CHECKOUT = not _PACKED.is_dir()
CONF = ROOT / "conf" if CHECKOUT else _PACKED
# How a user starts a run.
RUN = ("python", "harness/main.py") if CHECKOUT else ("llama-harness",)
PROGRAM = RUN[-1]
# The same behind DeepSpeed's command and its options.
LAUNCHED = "harness/main.py" if CHECKOUT else "--module harness.main"


def import_path() -> dict[str, str]:
    """Returns the variable by which a Python program that we start finds this harness.

    What is installed is found anyway; first on the path, its neighbours would shadow Python's own modules.
    """
    known = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT) if CHECKOUT else "", known]))}
