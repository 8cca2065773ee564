"""A stage's own process: ``python -m acceptance.stage NAME --out DIR [--rehearse] [--limit SECONDS]``.

A stage is a module ``acceptance.on_NAME`` with ``run(stage)``. What it finds out it reports here as it goes; at the
start after an interruption it skips what it had reported. SIGTERM, which the driver sends at the limit, raises
SystemExit in it, so that ``finally`` ends what it has started.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from acceptance import findings
from acceptance.findings import Figure, Finding, Outcome
from harness.basics.errors import one_line

MARK = "ACCEPTANCE_STAGE"  # the environment variable that all processes of a stage have which the driver started
PR_SET_PDEATHSIG = 1
DEATHS = 2  # of the process inside one check, before that is left alone
ANEW, MOST_ANEW = "ACCEPTANCE_ANEW", 8  # how often a stage started anew
TERMINATED = 128 + signal.SIGTERM  # exit status


@dataclass
class Check:
    """What the body of ``with stage.check(name) as check`` may fill in.

    Attributes:
        outcome: passed, unless the body says otherwise or raises.
    """

    outcome: Outcome = Outcome.passed
    detail: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)


class Stage:
    """What a stage is given.

    Attributes:
        name: of the stage.
        rehearse: whether no GPU is to be used: the CPU, stand-ins and tiny sizes do.
        device: ``"cuda"``, or ``"cpu"`` in a rehearsal.
        out: the folder of the whole acceptance, shared by all stages.
        folder: the stage's own files below it: logs of runs, traces.
        results: ``results_dir`` of every run of the harness that belongs to the acceptance.
        limit_s: seconds from its start until SIGTERM.
    """

    def __init__(self, name: str, out: Path, *, rehearse: bool = False, limit_s: float = math.inf) -> None:
        self.name = name
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.out = out.resolve()
        self.folder = self.out / name
        self.results = self.out / "results"
        self.limit_s = limit_s
        for folder in (self.folder, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self._started = self._last = time.monotonic()
        self._file = self.out / f"{name}.jsonl"
        self._found = {finding.name: finding for finding in findings.read(self._file)}
        self._deaths = findings.deaths(self._file)

    def left_s(self) -> float:
        """Returns the seconds left before SIGTERM, 0 at least."""
        return max(0.0, self._started + self.limit_s - time.monotonic())

    def done(self, name: str) -> bool:
        """Whether this was recorded before, by an attempt that was interrupted perhaps, whatever its outcome.

        A check in which the process died twice counts as failed, so that the stage comes to what is behind it.
        """
        if name not in self._found and self._deaths[name] >= DEATHS:
            self._record(name, Outcome.failed, f"the process died here, {self._deaths[name]} times", {}, 0.0)
        return name in self._found

    def report(self, name: str, outcome: Outcome | str, detail: str = "", **figures: Figure) -> None:
        """Records a finding, on disk at once, and prints it; it took the seconds since the one before."""
        self._record(name, Outcome(outcome), detail, figures, time.monotonic() - self._last)

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Records how the body ends, as ``name``: passed, what it sets, or failed where it raises.

        The stage goes on either way, in a new process where this one can use the GPU no more; the traceback goes to its
        log. ``if not stage.done(name):`` belongs before it.
        """
        check, started = Check(), time.monotonic()
        findings.note(self._file, "begun", name)
        try:
            yield check
        except Exception as error:
            traceback.print_exc()
            check.outcome, check.detail = Outcome.failed, last_line(error)
        except BaseException:
            findings.note(self._file, "left", name)
            raise
        self._record(name, check.outcome, check.detail, check.figures, time.monotonic() - started)
        if check.outcome is Outcome.failed and _spoiled():
            self._start_anew()

    def finding(self, name: str) -> Finding | None:
        """Returns what this stage recorded as ``name``."""
        return self._found.get(name)

    def other(self, stage_name: str) -> list[Finding]:
        """Returns what another stage has recorded so far."""
        return findings.read(self.out / f"{stage_name}.jsonl")

    def figure(self, stage_name: str, key: str) -> Figure | None:
        """Returns a figure that another stage recorded, such as ``figure("machine", "copy_bytes_per_s")``."""
        known = [finding.figures[key] for finding in self.other(stage_name) if key in finding.figures]
        return known[-1] if known else None

    def _record(self, name: str, outcome: Outcome, detail: str, figures: dict[str, Any], seconds: float) -> None:
        finding = Finding(name, outcome, one_line(detail), figures, round(seconds, 3))
        findings.append(self._file, finding)
        self._found[name] = finding
        self._last = time.monotonic()
        print(f"[{finding.seconds:.1f} s] {finding.line()}", flush=True)

    def _start_anew(self) -> None:
        """Puts a new process in the place of this one, which skips what is recorded; the limit goes on."""
        count = int(os.environ.get(ANEW, "0")) + 1
        if count > MOST_ANEW:
            return
        print("the GPU cannot be used by this process any more: it starts anew", flush=True)
        os.environ[ANEW] = str(count)
        os.closerange(3, 65536)  # the GPU's among them, so that it gives back what this process had there
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--limit", f"{self.left_s():.1f}"])


def _spoiled() -> bool:
    """Whether an error of the GPU, such as an illegal access, has spoiled all that this process has there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # torch has several for it, by version
        return True
    return False


def last_line(error: BaseException) -> str:
    """Returns an exception as the last line of its traceback."""
    return one_line(traceback.format_exception_only(error)[-1])


def main() -> int:
    """Runs one stage; the exit status is 1 where it raised, whatever its findings say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--limit", type=float, default=math.inf)
    parser.add_argument("--module", help="default: acceptance.on_NAME")
    asked = parser.parse_args()
    stage = Stage(asked.name, asked.out, rehearse=asked.rehearse, limit_s=asked.limit)
    _listen()
    try:
        importlib.import_module(asked.module or f"acceptance.on_{asked.name}").run(stage)
    except Exception as error:
        traceback.print_exc()
        stage.report("the stage itself", Outcome.failed, last_line(error))
        return 1
    return 0


def _listen() -> None:
    """Has SIGTERM write where each thread is to the log, even from a hang in C, and then raise SystemExit."""
    faulthandler.enable()

    def end(number: int, frame: FrameType | None) -> None:
        print("ended by SIGTERM", flush=True)
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    faulthandler.register(signal.SIGTERM, chain=True)
    if MARK in os.environ:  # nothing goes on without the driver
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    from acceptance.stage import main as run  # the module that stages import, not a second one named __main__

    sys.exit(run())
