"""What the stages of the acceptance start: several commands at a time, each within its time, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.runs import PACED, RANDOM, ROOT, TINY

sys.path.insert(0, str(ROOT / "launch"))

from acceptance import cases, harness_run, on_failures
from acceptance.commands import Ended, Steps, command, command_steps, together
from acceptance.findings import Outcome
from acceptance.harness_run import HarnessRun, Verdict
from acceptance.stage import Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("toys", tmp_path, rehearse=True)


def sleeping(seconds: float) -> list[str]:
    return ["-c", f"import time; print('begun', flush=True); time.sleep({seconds})"]


def two(stage: Stage, name: str, first: list[str]) -> Steps[list[Ended]]:
    one = yield from command_steps(stage, name, first, 60)
    return [one, (yield from command_steps(stage, f"{name} again", ["-c", f"print({name!r})"], 60))]


def test_commands_go_on_beside_each_other_and_come_back_in_order(stage: Stage, tmp_path: Path) -> None:
    """The first waits for a file that the last one of its own job makes: one after the other would never end."""
    place = tmp_path / "here"
    waits = ["-c", f"import os, time\nwhile not os.path.exists({str(place)!r}): time.sleep(0.02)"]
    makes = ["-c", f"open({str(place)!r}, 'w').close()"]
    found = together([two(stage, "a", waits), two(stage, "b", makes), two(stage, "c", ["-c", "exit(3)"])], 2)
    assert [[one.status for one in ended] for ended in found] == [[0, 0], [0, 0], [3, 0]]
    assert [ended[1].stdout for ended in found] == ["a\n", "b\n", "c\n"]


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(stage: Stage) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    script = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=-1)\n"
    script += "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    ended = command(stage, "long", ["-c", script], 3)
    assert ended.timed_out and ended.status == -signal.SIGTERM
    assert "not finished after" in ended.how
    assert not psutil.pid_exists(int(ended.stdout)) or psutil.Process(int(ended.stdout)).status() == "zombie"


def test_a_stage_without_time_left_finds_out_nothing_and_is_to_go_on_later(tmp_path: Path) -> None:
    short = Stage("toys", tmp_path, rehearse=True, limit_s=4)
    with pytest.raises(SystemExit) as ended:
        command(short, "long", sleeping(60), 60)
    assert ended.value.code == os.EX_TEMPFAIL
    assert not [child for child in psutil.Process().children() if "begun" in " ".join(child.cmdline())]


STAGE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from acceptance import stage
from acceptance.commands import command_steps, together

def run(it):
    it.report("first", "passed")
    sleeping = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    together([command_steps(it, name, sleeping, 100) for name in "ab"], 2)

stage.importlib.import_module = lambda name: type("Module", (), dict(run=staticmethod(run)))
sys.argv = ["stage", "toys", "--out", {out!r}]
sys.exit(stage.main())
"""


def test_sigterm_to_a_stage_ends_what_it_has_started(tmp_path: Path) -> None:
    path = [str(ROOT), str(ROOT / "launch")]
    process = subprocess.Popen([sys.executable, "-c", STAGE.format(path=path, out=str(tmp_path))], stdout=-1, text=True)
    logs = [tmp_path / "toys" / f"{name}.log" for name in "ab"]
    until = time.monotonic() + 60
    while not all(log.exists() and log.read_text() for log in logs):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert Stage("toys", tmp_path).done("first")


def test_a_run_is_found_with_what_it_left_behind(stage: Stage) -> None:
    words = [*PACED, *TINY, *RANDOM, "dataset.num_samples=3", "engine.pace=0"]
    first, refused = together(
        [
            harness_run.harness_steps(stage, "simulated", *words, timeout_s=60),
            harness_run.harness_steps(stage, "refused", "engine=mii", timeout_s=60),
        ],
        2,
    )
    assert first.ok and first.row is not None and first.row["completed"] == "3", first.how
    assert first.directory is not None and first.record["run_id"] == first.directory.name == first.row["run_id"]
    assert refused.refused and not refused.ok and refused.how.startswith("engine: mii needs CUDA")
    assert refused.row is not None and refused.row["status"] == "invalid"


@pytest.mark.slow
def test_a_run_is_disturbed_once_it_has_finished_some_requests(stage: Stage) -> None:
    words = [*PACED, *TINY, *RANDOM, "dataset.num_samples=10000"]
    tick = on_failures.signalled(stage, signal.SIGTERM)
    (run,) = together([harness_run.harness_steps(stage, "disturbed", *words, timeout_s=100, tick=tick)], 1)
    assert (run.status, run.record["status"]) == (130, "interrupted"), run.how
    assert run.record["completed"] >= on_failures.MORE


@pytest.mark.parametrize(
    ("detail", "refusal", "outcome"),
    [
        ("engine: mii is not installed", "^engine: mii is not installed", Outcome.refused),
        ("model.path: no such directory", "^engine: mii is not installed", Outcome.failed),
        ("model.path: no such directory", None, Outcome.failed),
    ],
)
def test_a_refusal_counts_for_what_it_was_expected_for_alone(
    detail: str, refusal: str | None, outcome: Outcome
) -> None:
    found = cases.expected(Verdict(Outcome.refused, detail, {}), refusal)
    assert found.outcome is outcome and found.detail.endswith(detail)


def test_a_run_on_another_device_has_not_passed(stage: Stage) -> None:
    row = {"status": "ok", "device": "cuda", "peak_memory_bytes": "7"}
    passed = Verdict(Outcome.passed, "", {})
    elsewhere = HarnessRun(0, 1.0, False, "", "", row)
    assert cases.on_device(stage, elsewhere, passed).outcome is Outcome.failed
    here = HarnessRun(0, 1.0, False, "", "", row | {"device": "cpu"})
    assert cases.on_device(stage, here, passed).outcome is Outcome.passed
    unmeasured = HarnessRun(0, 1.0, False, "", "", row | {"device": "cpu", "peak_memory_bytes": ""})
    assert cases.on_device(stage, unmeasured, passed).outcome is Outcome.failed
