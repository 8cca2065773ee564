"""Runs that are ended early and resumed, and what must be true of one afterwards."""

from __future__ import annotations

import atexit
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest

from harness.models import demo
from harness.verify import __main__ as verify
from support import runs, warm
from support.models import save_small_demo
from support.runs import Run, begun, check_against_ids, command

REQUESTS = 24


@cache
def work() -> list[str]:
    """Returns a job of seconds whose tokens depend on everything before them; the checkpoint goes with this process."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    model = save_small_demo(place / "model", demo.ensure(), num_hidden_layers=8)
    job = [f"model.path={model}", "model.dtype=float32", "engine.kernels=torch", "engine.max_sequences=2"]
    return [*job, f"dataset.num_samples={REQUESTS}", "generation.stop=length"]


def begin(
    results: Path,
    *overrides: str,
    launcher: tuple[str, ...] = (sys.executable,),
    words: list[str] | None = None,
    forked: bool = True,
) -> subprocess.Popen[str]:
    """Starts a run of :func:`work`, ``forked`` as in :func:`begun`; what it says is in ``results``.log."""
    line = command(*(work() if words is None else words), *overrides, f"results_dir={results}", launcher=launcher)
    with open(f"{results}.log", "ab") as log:
        return begun(line, forked=forked, stdout=log, stderr=log, start_new_session=True)


def finished(results: Path) -> int:
    """Returns how many lines the one run in ``results`` has written."""
    return sum(path.read_bytes().count(b"\n") for path in results.glob("*/completions.jsonl"))


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Returns whether ``condition`` came true before the run ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return False


def family(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Returns a launch's processes by what they are: ``launcher``, ``deepspeed``, ``rank 0``, ..."""
    launcher = psutil.Process(process.pid)
    found = {"launcher": warm.fork_of(launcher)}
    for line, member in runs.family(launcher):
        if "deepspeed.launcher.launch" in line:
            found["deepspeed"] = member
        elif (number := runs.local_rank(line)) is not None:
            found[f"rank {number}"] = member
    if len(found) == 1:
        found["rank 0"] = found["launcher"]
    return found


def kill(process: subprocess.Popen[str], victim: str) -> None:
    """Kills one process of a launch with SIGKILL, or ``all`` of them at once."""
    members = family(process)
    for name, member in members.items():
        if name == victim or victim == "all" or victim not in members:
            try:
                member.kill()
            except psutil.Error:
                pass


def interrupt(process: subprocess.Popen[str]) -> None:
    """Sends SIGINT to all of a launch, as Ctrl-C in a terminal does."""
    for member in family(process).values():
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGINT)


def passed(moment: float) -> bool:
    return time.monotonic() >= moment


def has_lines(results: Path, lines: int) -> bool:
    return run_id_in(results) is not None and finished(results) >= lines


def run_id_in(results: Path) -> str | None:
    found = [path.parent.name for path in results.glob("*/record.json")]
    return found[0] if found else None


def complete_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def check(run: Run, whole: Run) -> None:
    """Asserts that a resumed run has what the uninterrupted one has, in one row that adds up."""
    assert run.status == 0, run.stderr
    assert run.row["status"] == "ok"
    assert run.token_ids == whole.token_ids
    for name in ("requests", "completed", "prompt_tokens", "output_tokens", "total_tokens"):
        assert run.row[name] == whole.row[name]
    check_sums(run)


def check_sums(run: Run) -> None:
    """Asserts that a resumed run's row and segments add up to what is in its files."""
    check_against_ids(run)
    record = run.record
    parts = record["segments"]
    assert len(parts) >= 2 and "segment" not in record
    assert sum(part["elapsed_s"] for part in parts) == pytest.approx(record["elapsed_s"])
    assert sum(part["completed"] for part in parts) == REQUESTS
    assert all(part["elapsed_s"] >= 0 for part in parts)
    assert max(line["finished_s"] for line in run.completions.values()) <= record["elapsed_s"]
    tokens = sum(len(line["token_ids"]) + line["prompt_tokens"] for line in run.completions.values())
    assert float(run.row["total_tokens_per_s"]) == pytest.approx(tokens / record["elapsed_s"], rel=1e-5)
    assert "resumed" in record["notes"][-1]
    assert verify.main([str(run.directory)]) == 0


def watchdogs(word: str) -> list[psutil.Process]:
    """Returns the processes that wait for a rank 0 to end, by its run's id or its directory of results."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if word in words and any(word.endswith("watchdog.py") for word in words):
            found.append(warm.fork_of(process))
    return found
