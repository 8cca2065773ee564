"""``harness/main.py`` whose kernels compute each pass after the call that launched it: see ``Late``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT / "harness")  # as it is for main.py, which replaces it
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]
sys.argv.remove("harness/main.py")

from harness.engines.base import EngineSettings  # noqa: E402
from harness.engines.fastgen.runners import choice  # noqa: E402
from support.late_device import Late  # noqa: E402

choose = choice.choose


def late(settings: EngineSettings) -> tuple[Any, str | None]:
    """Returns the runner that was chosen, behind one that is late."""
    runner, note = choose(settings)
    return Late(runner), note


choice.choose = late
sys.argv[0] = str(ROOT / "harness" / "main.py")
runpy.run_path(sys.argv[0], run_name="__main__")
