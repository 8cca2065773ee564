"""Faults planted into copies of the harness are caught; ``python tests/check_mutations.py`` shows all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from check_mutations import CAUGHT, FAULTS, NOTHING, PASSES, missed, verified
from support.forgeries import FORGERIES
from support.runs import ROOT, variables

SCRIPT = [sys.executable, "tests/check_mutations.py"]


def checked(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SCRIPT, *arguments], cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
@pytest.mark.endurance
def test_planted_faults_are_caught(scale: Callable[[int, int], int]) -> None:
    names = checked("--list").stdout.splitlines()
    assert {"drops a token", "counts padding", "swaps two sequences' caches", "forges the clock"} <= set(names)
    full = scale(0, 1)
    chosen = names if full else ["swaps two sequences' caches", "forges the clock"]
    done = checked(*chosen, *([] if full else ["--no-tests"]), timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3 + len(chosen)


def test_every_fault_still_has_its_place() -> None:
    for fault in FAULTS:
        assert len(fault.places(ROOT)) == 1, fault.name
        (path,) = fault.places(ROOT)
        compile(path.read_text().replace(fault.old, fault.new), path, "exec")


def test_a_fault_that_is_none() -> None:
    done = checked("eats a token")
    assert (done.returncode, done.stderr) == (2, "error: NAME: no fault 'eats a token'; see --list\n")


def test_a_copy_that_ends_without_completions_is_caught_by_its_run(tmp_path: Path) -> None:
    fault = FAULTS[0]
    assert verified(tmp_path) == verified(tmp_path / "none") == NOTHING
    ended = dict.fromkeys(("recount", "against", "model"), NOTHING) | {"tests": CAUGHT}
    assert missed(fault, {"run": CAUGHT, **ended}) == []
    assert missed(fault, {"run": PASSES, **ended}) != []
    assert missed(None, {"run": CAUGHT, **ended}) != []
    full = dict.fromkeys(("run", "recount", "against", "model", "tests"), CAUGHT)
    assert missed(fault, full) == [] and missed(fault, full | {"recount": PASSES}) == ["recount"]
    assert missed(FORGERIES[0], {"recount": PASSES, "against": CAUGHT, "model": CAUGHT}) == ["recount"]
