"""The acceptance's driver: stages that end in every way, what the table says, and what a second start repeats."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.runs import ROOT

sys.path.insert(0, str(ROOT / "launch"))

from acceptance import archive, findings, here, kernels, records
from acceptance.child import Child
from acceptance.findings import Finding, Outcome
from acceptance.records import Status
from acceptance.stage import Stage
from acceptance.stages import STAGES
from support import acceptance_toys as toys

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / one) for one in (".", "launch", "tests"))}
PASSED = ("passes", "waits", "needs_it", "refused", "leaves", "lets_go")


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """Starts a rehearsal of the toys."""
    command = [sys.executable, "-m", "acceptance", "--rehearse", "--stages", toys.PATH, "--out", str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)


def rehearse(out: Path, *words: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """Rehearses to the end; returns exit status, what was printed, and the stages of table.json."""
    process = start(out, *words)
    stdout, stderr = process.communicate(timeout=120)
    assert not stderr, stderr
    table = json.loads((out / "table.json").read_text())
    return process.returncode, stdout, {stage["stage"]: stage for stage in table["stages"]}


def reached(out: Path, stage: str) -> list[str]:
    """Returns the points that a toy has reached, in all attempts."""
    return (out / stage / "reached").read_text().split()


def until_begun(process: subprocess.Popen[str], out: Path) -> None:
    """Returns once the toy that waits for another has recorded its first finding."""
    while not findings.read(out / "waits.jsonl"):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, dict[str, Any]]]:
    """Returns the folder of a first start of all toys, what it printed, and how they went."""
    out = tmp_path_factory.mktemp("acceptance")
    status, printed, stages = rehearse(out)
    assert status == 1
    return out, printed, stages


@pytest.fixture(scope="module")
def second(first: tuple[Path, str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Returns what a second start in that folder printed, and how the toys went."""
    _, printed, stages = rehearse(first[0])
    return printed, stages


def test_each_end_is_told_apart_and_the_rest_runs(first: Any) -> None:
    _, _, stages = first
    status = {name: stage["status"] for name, stage in stages.items()}
    assert list(status) == [plan.name for plan in toys.STAGES]
    assert status == dict.fromkeys(PASSED, "passed") | {
        "fails": "failed",
        "raises": "failed",
        "spoils": "failed",
        "silent": "failed",
        "hangs": "timeout",
        "dies_before": "killed",
        "dies_between": "killed",
        "dies_after": "killed",
        "short_of_time": "timeout",
    }
    assert stages["dies_between"]["signal"] == 9 and stages["dies_between"]["exit"] is None
    assert stages["raises"]["exit"] == 1 and stages["raises"]["signal"] is None
    assert stages["silent"]["reason"] == "it found out nothing"


def test_findings_before_a_death_are_kept(first: Any) -> None:
    _, _, stages = first
    kept = {name: [one["name"] for one in stage["findings"]] for name, stage in stages.items()}
    assert kept["dies_before"] == []
    assert kept["dies_between"] == ["first"]
    assert kept["dies_after"] == list(toys.POINTS)
    assert kept["hangs"] == ["before"]


def test_the_table_has_every_stage_and_every_reason(first: Any) -> None:
    out, printed, _ = first
    table = (out / "table.txt").read_text()
    assert table in printed
    lines = table.splitlines()
    assert lines[0].startswith("rehearsal on CPU") and "torch" in lines[0] and "commit" in lines[0]
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(toys.STAGES)]}
    assert list(rows) == [plan.name for plan in toys.STAGES]
    assert rows["dies_after"].split()[3:8] == ["3", "0", "0", "0", "0"] and "died by SIGKILL" in rows["dies_after"]
    assert "not done after 4 s" in rows["hangs"]
    below = lines[2 + len(toys.STAGES) :]
    assert "  fails: wrong: failed: ValueError: not close error=0.25" in below
    assert "  raises: the stage itself: failed: RuntimeError: outside of a check" in below
    assert "  refused: fp6: refused: wf6af16 needs compute capability 8.x" in below
    assert "  passes: rate: measured tokens_per_s=1235" in below
    assert not any("peers" in line or "first" in line for line in below)


def test_a_background_stage_runs_beside_those_that_do_not_need_it(first: Any) -> None:
    """It ends only after the last of the others, and what needs it starts only then."""
    _, printed, _ = first
    started = [line.split()[1].removesuffix(":") for line in printed.splitlines() if ": started" in line]
    assert started.index("waits") == 1 and started[-1] == "needs_it"


def test_a_hang_leaves_its_stack_in_the_log(first: Any) -> None:
    log = (first[0] / "hangs.log").read_text()
    assert "in _hangs" in log and "ended by SIGTERM" in log


def test_a_spoiled_gpu_costs_one_check(first: Any) -> None:
    """The stage goes on in a new process, under the same number and limit."""
    out, _, stages = first
    assert [one["outcome"] for one in stages["spoils"]["findings"]] == ["passed", "failed", "passed"]
    assert len({point.partition("-")[2] for point in reached(out, "spoils")}) == 1
    assert "it starts anew" in (out / "spoils.log").read_text()


def test_nothing_is_left_running(first: Any) -> None:
    pid = int((first[0] / "leaves" / "pid").read_text())
    assert not psutil.pid_exists(pid)
    assert "were left and are ended" in (first[0] / "leaves.log").read_text()


def test_a_second_start_repeats_nothing_that_is_done(first: Any, second: Any) -> None:
    printed, stages = second
    before = first[2]
    for name in (*PASSED, "fails", "raises", "silent"):
        assert f"{name}: {stages[name]['status']} before" in printed
        assert stages[name]["started_at"] == before[name]["started_at"]
    assert reached(first[0], "passes") == list(toys.POINTS)


def test_a_second_start_goes_on_in_what_was_interrupted(first: Any, second: Any) -> None:
    out, stages = first[0], second[1]
    for name in ("hangs", "dies_before", "dies_between", "dies_after", "short_of_time"):
        assert stages[name]["status"] == "passed", name
    for name in ("dies_before", "dies_between", "dies_after"):
        assert [point for point in reached(out, name) if point != "death"] == list(toys.POINTS)
    assert reached(out, "hangs") == ["before", "hang", "hang"]


def test_what_is_carried_away(first: Any, second: Any) -> None:
    out = first[0]
    with tarfile.open(out / "acceptance.tar.gz") as packed:
        names = {name.removeprefix(f"{out.name}/") for name in packed.getnames()}
    assert {"table.txt", "table.json", "fails.json", "fails.jsonl", "fails.log", "passes/reached"} <= names
    assert not any(name.endswith((".tar.gz", ".lock")) for name in names)


def test_again_and_only(tmp_path: Path) -> None:
    assert rehearse(tmp_path, "--only", "passes")[0] == 0
    (stale,) = tmp_path.rglob("reached")
    stale.write_text("of the first time")
    status, _, stages = rehearse(tmp_path, "--only", "refused", "--again", "passes")
    assert status == 0 and set(stages) == {"passes", "refused"}
    assert reached(tmp_path, "passes") == list(toys.POINTS)


def test_a_needed_stage_that_did_not_end_is_a_reason(tmp_path: Path) -> None:
    """The background stage is ended at a limit of its own, which the budget sets; no time is left for the rest."""
    status, _, stages = rehearse(tmp_path, "--only", "passes,needs_it", "--budget", "0.1")
    assert status == 1
    assert {name: stage["reason"] for name, stage in stages.items()} == {
        "passes": "no time left",
        "waits": "no time left",
        "needs_it": "it needs waits: missing",
    }
    assert all(stage["status"] == "missing" for stage in stages.values())


def test_sigterm_ends_the_stage_and_prints_the_table(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "waits,needs_it")  # no stage comes that it waits for
    until_begun(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    printed, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and not stderr
    table = (tmp_path / "table.txt").read_text()
    assert table in printed and table.count("the acceptance was ended by SIGTERM") == 2
    stages = {one["stage"]: one for one in json.loads((tmp_path / "table.json").read_text())["stages"]}
    assert stages["waits"]["status"] == "killed" and stages["needs_it"]["status"] == "missing"
    assert [one["name"] for one in stages["waits"]["findings"]] == ["begun"]


def test_a_stage_ends_with_its_driver(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "waits")
    until_begun(process, tmp_path)
    (stage,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs([stage], timeout=60)[1]
    status, _, stages = rehearse(tmp_path, "--only", "waits,lets_go")
    assert status == 0 and stages["waits"]["status"] == "passed"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--only", "nothing"), "--only: 'nothing'; give some of passes, "),
        (("--budget", "0"), "--budget: 0; give seconds"),
    ],
)
def test_arguments_are_refused(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    process = start(tmp_path / "out", *words)
    assert line in process.communicate(timeout=60)[1]
    assert process.returncode == 2 and not (tmp_path / "out").exists()


def test_another_card_s_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "acceptance.json").write_text('{"mode": "real", "card": "NVIDIA H100"}')
    process = start(tmp_path)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert "it holds a real on NVIDIA H100, this is a rehearsal on CPU" in stderr


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    child = Child("deaf", [sys.executable, "-c", script], dict(os.environ), log, 600, kill_s=0.1)
    while "deaf\n" not in log.read_text().replace("deaf:", ""):
        time.sleep(0.02)
    child.end(Status.timeout, "enough")
    while not child.over():
        time.sleep(0.02)
    assert child.process.returncode == -signal.SIGKILL
    assert child.status(any_failed=False, any_found=True) == (Status.timeout, "enough")


def test_a_check_in_which_the_process_died_twice_is_left_alone(tmp_path: Path) -> None:
    Stage("toy", tmp_path)
    for _ in range(2):
        assert not Stage("toy", tmp_path).done("deadly")
        findings.note(tmp_path / "toy.jsonl", "begun", "deadly")
    stage = Stage("toy", tmp_path)
    assert stage.done("deadly")
    assert stage.finding("deadly").outcome is Outcome.failed and not stage.done("next")


def test_a_line_cut_off_by_a_death_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    findings.append(path, Finding("one", Outcome.passed, "", {}, 0.0))
    path.write_text(path.read_text() + '{"name": "tw')
    assert [one.name for one in findings.read(path)] == ["one"]
    findings.append(path, Finding("three", Outcome.passed, "", {}, 0.0))
    assert [one.name for one in findings.read(path)] == ["one", "three"]


def test_the_archive_leaves_out_what_is_too_large(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "wide").mkdir(parents=True)
    (out / "table.txt").write_text("table")
    (out / "wide" / "model.safetensors").write_bytes(b"weights")
    (out / "wide" / "trace.json").write_bytes(os.urandom(300_000))
    (out / "wide" / "small.log").write_text("short")
    size, left = archive.pack(out, out / "acceptance.tar.gz", most=200_000)
    assert size < 200_000 and left == ["wide/trace.json"]
    with tarfile.open(out / "acceptance.tar.gz") as packed:
        assert packed.getnames() == ["out/table.txt", "out/wide/small.log"]


def test_compiled_kernels_go_to_the_next_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "first" / "extensions" / "ragged_ops"
    made.mkdir(parents=True)
    (made / "ragged_ops.so").write_bytes(b"code")
    os.utime(made / "ragged_ops.so", (1_700_000_000.9, 1_700_000_000.9))
    (made / "lock").touch()
    monkeypatch.setenv(kernels.VARIABLE, str(tmp_path / "kernels.tar.gz"))
    assert kernels.pack(tmp_path / "first", tmp_path / "kernels.tar.gz")
    there = tmp_path / "next" / "extensions" / "ragged_ops"
    assert kernels.restore(tmp_path / "next").endswith("restored")
    assert [path.name for path in there.iterdir()] == ["ragged_ops.so"]
    assert (there / "ragged_ops.so").stat().st_mtime == 1_700_000_000  # not later than ninja's notes say
    assert kernels.restore(tmp_path / "next").endswith("filled here before")
    monkeypatch.setattr(kernels, "made_with", lambda: {"torch": "other"})
    assert kernels.restore(tmp_path / "third").endswith("not used") and not (tmp_path / "third").exists()


def test_a_real_stage_s_kernels_are_kept_with_its_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    real, rehearsal = (here.environment(rehearse, tmp_path) for rehearse in (False, True))
    assert real["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "extensions")
    assert real["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert (real["DS_ACCELERATOR"], rehearsal["DS_ACCELERATOR"]) == ("cuda", "cpu")
    assert "TRITON_INTERPRET" not in real and rehearsal["TRITON_INTERPRET"] == "1"


def test_wheels_go_into_an_environment_of_their_own(tmp_path: Path) -> None:
    """Once; it sees the packages of the interpreter, and what was compiled before is newer than the sources."""
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    checkout.mkdir()
    for name in ("launch", "harness", "tests"):
        (checkout / name).symlink_to(ROOT / name)
    (wheels / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(wheels / "wheels" / "brought-1.0-py3-none-any.whl", "w") as wheel:
        information = {"METADATA": "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n", "RECORD": ""}
        information["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in {f"brought-1.0.dist-info/{key}": text for key, text in information.items()}.items():
            wheel.writestr(name, text)
        for name in ("__init__.py", "kernel.cu"):
            wheel.writestr(f"brought/{name}", "")
    (wheels / "join.sh").write_text('echo "model in $1"\n')
    (wheels / "SHA256SUMS").write_text("sums\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {"ACCEPTANCE_WHEELS": str(wheels), "PATH": path, "HARNESS_CACHE": str(tmp_path / "cache")}
    for setting_up in (True, False):
        command = ["bash", "launch/gpu_acceptance.sh", "--only", "nothing"]
        done = subprocess.run(command, cwd=checkout, env=os.environ | more, capture_output=True, text=True)
        assert done.stdout == f"model in {tmp_path}/cache/SmolLM2-135M-Instruct\n"
        assert ("setting up .venv-acceptance" in done.stderr) == setting_up, done.stderr
        assert done.returncode == 2 and "--only: 'nothing'" in done.stderr
        more["PATH"] = f"{checkout / '.venv-acceptance/bin'}:{path}"  # as one has it who looks into it
    script = "import brought, importlib.util; print(brought.__file__, importlib.util.find_spec('torch').origin)"
    found = subprocess.run([checkout / ".venv-acceptance/bin/python", "-c", script], stdout=-1, text=True, check=True)
    ours, theirs = map(Path, found.stdout.split())
    assert ours.is_relative_to(checkout) and theirs == Path(str(importlib.util.find_spec("torch").origin))
    assert ours.with_name("kernel.cu").stat().st_mtime < 1_600_000_000


def test_every_stage_is_there() -> None:
    names = [plan.name for plan in STAGES]
    for place, plan in enumerate(STAGES):
        assert set(plan.needs) <= set(names[:place]), "it would wait for what comes later"
        assert importlib.util.find_spec(plan.module) is not None, plan.module
        source = ROOT / "launch" / f"{plan.module.replace('.', '/')}.py"
        assert "def run(stage: Stage) -> None:" in source.read_text()


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    findings.append(tmp_path / "toy.jsonl", Finding("one", Outcome.measured, "so", {"rate": 1.5}, 0.5))
    record = records.Record("toy", "a toy", Status.timeout, "late", findings=findings.read(tmp_path / "toy.jsonl"))
    record.write(tmp_path)
    assert records.read(tmp_path, "toy") == record
    records.forget(tmp_path, "toy")
    assert records.read(tmp_path, "toy") is None
