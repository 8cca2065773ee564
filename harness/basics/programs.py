"""Programs that are installed with the interpreter's packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def beside_the_interpreter() -> None:
    """Puts the interpreter's own directory first on ``PATH``; a second time it does nothing.

    Ninja and the deepspeed command are installed there, and the interpreter may have been called by its path.
    """
    place = str(Path(sys.executable).parent)
    known = os.environ.get("PATH", "")
    if known.split(os.pathsep)[0] != place:
        os.environ["PATH"] = os.pathsep.join(filter(None, [place, known]))
