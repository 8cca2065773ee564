"""How OpenMP's threads wait for each other."""

from __future__ import annotations

import os

# Turns, some 20 us: about what it costs to sleep and be woken, so that waiting costs at most twice the best of both.
# GNU's default is 300,000, some milliseconds, which a thread whose partner has lost its core spends at every barrier;
# where it knows of too few cores it takes 1,000 by itself. Measured in results/NOTES.md.
SPIN_TURNS = 1000


def wait_briefly() -> None:
    """Has threads that wait sleep soon, unless the user has chosen; before the first library loads OpenMP."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_TURNS))
