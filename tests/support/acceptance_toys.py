"""Stages for the acceptance's driver that do nothing but end in every way: ``--stages support.acceptance_toys``.

Each point of a stage that is reached leaves a line in the stage's folder, so that a test sees what was repeated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

from acceptance.stage import Stage
from acceptance.stages import Plan

PATH = __name__
POINTS = ("first", "second", "third")
LONG_S = 600.0


def plan(name: str, limit_s: float = 60, needs: tuple[str, ...] = (), background: bool = False) -> Plan:
    """Returns a toy's plan."""
    return Plan(name, f"a toy that {name}", limit_s, needs, background, PATH)


STAGES = (
    plan("passes"),
    plan("waits", background=True),
    plan("needs_it", needs=("waits",)),
    plan("fails"),
    plan("raises"),
    plan("silent"),
    plan("hangs", limit_s=4),
    plan("dies_before"),
    plan("dies_between"),
    plan("dies_after"),
    plan("refused"),
    plan("short_of_time"),
    plan("spoils"),
    plan("leaves"),
    plan("lets_go"),
)


def run(stage: Stage) -> None:
    """Does what the stage's name says."""
    globals()[f"_{stage.name}"](stage)


def reached(stage: Stage, point: str) -> int:
    """Notes a point; returns how often it was reached."""
    with open(stage.folder / "reached", "a+") as file:
        file.write(f"{point}\n")
        file.seek(0)
        return file.read().splitlines().count(point)


def points(stage: Stage, dies_at: int | None = None) -> None:
    """Reports three findings, or dies before one of them, the first time; 3 is after the last."""
    for number, name in enumerate((*POINTS, "")):
        if number == dies_at and reached(stage, "death") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if name and not stage.done(name):
            reached(stage, name)
            with stage.check(name) as check:
                check.figures["number"] = number


def _passes(stage: Stage) -> None:
    points(stage)
    stage.report("rate", "measured", tokens_per_s=1234.5678)


def _waits(stage: Stage) -> None:
    """Ends once the last stage that does not need it has, so that this runs beside all of them."""
    stage.report("begun", "passed")
    while not (stage.out / "lets_go.jsonl").exists():
        time.sleep(0.02)
    stage.report("done", "passed")


def _needs_it(stage: Stage) -> None:
    stage.report("its end", "passed" if [one.name for one in stage.other("waits")] == ["begun", "done"] else "failed")


def _fails(stage: Stage) -> None:
    with stage.check("wrong") as check:
        check.figures["error"] = 0.25
        raise ValueError("not\nclose")
    with stage.check("right"):
        pass


def _raises(stage: Stage) -> None:
    stage.report("before", "passed")
    raise RuntimeError("outside of a check")


def _silent(stage: Stage) -> None:
    return


def _hangs(stage: Stage) -> None:
    if not stage.done("before"):
        reached(stage, "before")
        stage.report("before", "passed")
    if reached(stage, "hang") == 1:
        with stage.check("hang"):
            time.sleep(LONG_S)
    stage.report("after", "passed")


def _dies_before(stage: Stage) -> None:
    points(stage, 0)


def _dies_between(stage: Stage) -> None:
    points(stage, 1)


def _dies_after(stage: Stage) -> None:
    points(stage, 3)


def _refused(stage: Stage) -> None:
    stage.report("fp6", "refused", "wf6af16 needs compute capability 8.x")
    stage.report("peers", "skipped", "1 GPU")


def _short_of_time(stage: Stage) -> None:
    if not stage.done("one"):
        stage.report("one", "passed")
        sys.exit(os.EX_TEMPFAIL)
    stage.report("two", "passed")


def _spoils(stage: Stage) -> None:
    """Fails a check after which the GPU answers no more, as after an illegal access; a new process could use it."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in POINTS:
        if not stage.done(name):
            reached(stage, f"{name}-{os.getpid()}")
            with stage.check(name):
                if name == "second":
                    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
                    sys.modules["torch"] = cast(ModuleType, SimpleNamespace(cuda=cuda))
                if "torch" in sys.modules:
                    synchronize()


def _leaves(stage: Stage) -> None:
    """Leaves a process in a group of its own, and its child, whose parent has gone."""
    script = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid, flush=True)"
    made = subprocess.run([sys.executable, "-c", script], start_new_session=True, stdout=-1, text=True, check=True)
    Path(stage.folder, "pid").write_text(made.stdout)
    stage.report("left", "passed")


def _lets_go(stage: Stage) -> None:
    stage.report("done", "passed")
