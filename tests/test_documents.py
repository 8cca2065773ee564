"""What the documents say: their commands work, their tables are the code's, their links lead somewhere.

Commands are in blocks marked ``bash``. They are executed, or in the shortened form that stands below: what starts a
model runs on two requests of four tokens (``slow``), and here its config is composed and checked; what takes minutes
(sweeps, searches, benchmarks, the scripts in ``launch/``) has its options and overrides read by the real thing. A block
that needs more than this machine says so: ``bash gpu``, ``bash hosts`` or ``bash files``; its config is composed too.
"""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support import keys_tables
from support.documents import (
    LANGUAGES,
    MARKS,
    ROOT,
    Block,
    Command,
    commands,
    documents,
    mentioned,
    parts,
    tables,
)
from support.runs import python

from harness.config.compose import to_config
from harness.config.engine_schemas import registered
from harness.config.reference import sections
from harness.engines import catalogue
from harness.results.columns import COLUMNS
from harness.running import job as running_job

DOCUMENTS = documents()
BLOCKS = [block for document in DOCUMENTS for block in parts(document)[0]]
SHOWN = [command for block in BLOCKS if block.info[:1] == ("bash",) for command in commands(block)]
MENTIONED = [command for document in DOCUMENTS for command in mentioned(document)]
SAMPLE = "results/reference/sample"
MEASURED = "results/NOTES.md"
RUNS = ("20261123-221840-fastgen-7ef4", "20261123-221815-fastgen-2477")  # of the same job; for RUN_ID, in turn
FEW = ("dataset.num_samples=2", "generation.max_output_len=4")
SHORT = {  # how each benchmark is run here: once, and on little
    "launch/bench_disturbed.py": ("--rounds", "1", "--cores", "0", "--waits", "ours", *FEW),
    "launch/bench_engines.py": ("--rounds", "1", "--cores", "0", "--results", "{results}/bench", *FEW),
    "launch/bench_host.py": ("--queued", "600", "--passes", "20", "--device-passes", "20", "--pass-ms", "1"),
    "launch/bench_scheduler.py": ("--queued", "500", "--passes", "20"),
    "launch/bench_sweep.py": ("--rounds", "1", "--jobs", "1", *FEW),
    "launch/bench_telemetry.py": ("--rounds", "1", *FEW),
    "launch/measure_rounding.py": ("bfloat16",),
}
LONGER = ("launch/bench_disturbed.py", "launch/bench_sweep.py")  # several runs, each from the start
SCRIPTS = {  # in launch/, and the Python program behind each that has options of its own
    "launch/run.sh": None,
    "launch/setup.sh": None,
    "launch/test.sh": None,
    "launch/reference.sh": None,
    "launch/install_mii.sh": None,
    "launch/other_versions.sh": None,
    "launch/join.sh": None,
    "launch/collect_wheels.sh": "launch/collect_wheels.py",
    "launch/bench_cpu.sh": "launch/bench_cpu.py",
    "launch/gpu_acceptance.sh": "launch/acceptance/__main__.py",
}
# What begins so names its options itself; the rest of its words are overrides or files.
PROGRAMS = (
    "launch/bench_",
    "launch/compile_kernels.py",
    "launch/matrix_rate.py",
    "launch/measure_rounding.py",
    "launch/profile_pass.py",
    "launch/recount.py",
    "tests/",
)
LINT = ("ruff", "mypy", "lint-imports")  # in .venv/bin; launch/test.sh executes these lines


def names(found: list[Command]) -> list[Any]:
    """Returns each command once, as cases of a test; ``slow`` where the document tells of what was measured."""
    once = {(one.variables, one.words, one.marks): one for one in reversed(found)}
    return [
        pytest.param(command, id=str(command)[:120], marks=[pytest.mark.slow] * command.place.startswith(MEASURED))
        for command in reversed(once.values())
    ]


def overrides(command: Command) -> list[str] | None:
    """Returns what a command hands to Hydra, ``-m`` and the like included; None if it starts no run."""
    words = [word for word in command.words if word != "..."]
    if words[:2] == ["bash", "launch/run.sh"] or words[:1] == ["sbatch"]:
        script = next(place for place, word in enumerate(words) if word.startswith("launch/"))
        return words[script + 1 :]
    if words[0] == "llama-harness":
        return words[1:]
    for script in ("harness/main.py", "harness/accuracy/__main__.py", "harness.main"):
        if script in words and words[0] in ("python", "deepspeed"):
            return words[words.index(script) + 1 :]
    if words[:2] == ["python", "launch/multi_node.py"]:
        return words[words.index("--") + 1 :] if "--" in words else None
    commands_of_ours = (["python", "-m", "harness.accuracy"], ["python", "-m", "harness.doctor"])
    if words[:3] in commands_of_ours or (words[1:2] and words[1].startswith("launch/bench_")):
        options = [word for word in words if "=" in word and not word.startswith("-")]
        variants = [words[place + 1] for place, word in enumerate(words) if word == "--variant"]
        own = {variant for variant in variants if variant in options}
        return [word for word in options if word not in own]
    return None


def variants(command: Command) -> list[list[str]]:
    """Returns the overrides of each run that a command starts by itself: ``bench_engines.py --variant ...``."""
    words = list(command.words)
    found = [words[place + 1].split() for place, word in enumerate(words) if word == "--variant"]
    common = overrides(command) or []
    return [common + [word for word in one if not word.startswith(("cores=", "checkout="))] for one in found] or [
        common
    ]


def composed(words: list[str], accelerator: str) -> None:
    """Composes what ``words`` ask for, each job of a sweep by itself, and refuses what harness/main.py would."""
    words = [word for word in words if word != "..."]
    jobs = [[word for word in words if not word.startswith("-") and word != "job"]]
    if "-m" in words:
        parsed = OverridesParser.create().parse_overrides(jobs[0])
        if not any(word.partition("=")[0] == "experiment" for word in jobs[0]):
            jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    catalogue.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs:
            one = compose("config", job, return_hydra_config=True)
            with_schema = OmegaConf.masked_copy(one, [key for key in one if key != "hydra"])
            running_job.check(to_config(with_schema), accelerator)


def executable(command: Command) -> bool:
    """Whether a command is executed as it is, but on few requests; the rest is read by the real thing alone."""
    words = command.words
    if words[:3] in (("python", "-m", "harness.compare"), ("python", "-m", "harness.verify")):
        return True
    if words[:3] == ("python", "-m", "harness.plan"):
        return True
    if words[:3] in (("python", "-m", "harness.accuracy"), ("python", "-m", "harness.models.demo")):
        return True
    if words[:3] == ("python", "-m", "harness.doctor"):
        return True
    if words[:2] == ("python", "tests/check_mutations.py"):
        return "--list" in words
    begun = ("repeat=", "repeat_until=", "experiment=tune")
    several = [word for word in words if word == "-m" or word.startswith(begun)]
    return "harness/main.py" in words and not several


def executed_at_once(command: Command) -> bool:
    """Whether that takes a second or two, since no model is loaded."""
    words = command.words
    if "--help" in words or "--cfg" in words or "--list" in words:
        return True
    return words[:3] in (("python", "-m", "harness.compare"), ("python", "-m", "harness.plan"))


RUNNABLE = [command for command in SHOWN if not command.marks and executable(command)]
QUICK = [command for command in RUNNABLE if executed_at_once(command)]
SLOW = [command for command in RUNNABLE if not executed_at_once(command)]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in BLOCKS])
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.info and block.info[0] in LANGUAGES, "write ```bash, ```text, ... "
    assert MARKS.issuperset(block.info[1:]), f"known marks: {', '.join(sorted(MARKS))}"
    if block.info[0] == "bash":
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert block.info[1:] or commands(block), "a loop cannot be tried; mark what it needs"


@pytest.mark.parametrize("document", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS])
def test_no_block_is_indented_only(document: Path) -> None:
    before = ""
    for number, line in parts(document)[1]:
        assert before or not line.startswith("    "), f"line {number}: a block without a fence"
        before = line.strip()


@pytest.mark.parametrize("command", names(SHOWN + MENTIONED))
def test_a_command_is_one_that_works(command: Command) -> None:
    """Its script is there, its options are known to it, and its overrides compose and pass the checks."""
    words = command.words
    gpu = "gpu" in command.marks or "--num_gpus" in words
    for run in variants(command) if overrides(command) is not None else []:
        composed(run, "cuda" if gpu else "cpu")
    if words[0] == "bash":
        script = words[1].replace("DIR/", "launch/")  # collect_wheels.py copies join.sh
        assert script in SCRIPTS, "no test knows this script"
        assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
        if program := SCRIPTS[script]:
            options_are_known(program, words[2:])
    elif words[0].removeprefix(".venv/bin/") in LINT:
        script = (ROOT / "launch" / "test.sh").read_text()
        assert " ".join(words) in script, "launch/test.sh does not execute it"
    elif words[0] == "source":
        assert words[1:] == (".venv/bin/activate",)
    elif words[0] == "pytest" or words[1:3] == ("-m", "pytest"):
        pytest_arguments(words[1:] if words[0] == "pytest" else words[3:])
    elif words[0] == "python" and words[1].startswith(PROGRAMS):
        assert (ROOT / words[1]).is_file()
        if words[1].startswith(("launch/bench_", "launch/compile_", "launch/profile_")):
            options_are_known(words[1], words[2:])
    elif words[:2] == ("python", "-c"):
        compile(words[2], str(command), "exec")
        assert command.marks or command.inline
    else:
        begins_like = any(words[:3] == other.words[:3] for other in RUNNABLE) if command.inline else False
        known = command.marks or overrides(command) is not None or executable(command) or begins_like
        assert known or words[:2] == ("deepspeed", "--hostfile"), "no test executes it; mark its block if none can"


def options_are_known(program: str, words: tuple[str, ...]) -> None:
    """Asserts that a script of ours names each option in its own source."""
    source = (ROOT / program).read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{program} has no {word}"


def pytest_arguments(words: tuple[str, ...]) -> None:
    """Asserts that files, markers and our own options are there."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    known = {line.partition(":")[0] for line in settings["tool:pytest"]["markers"].split("\n")}
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    for place, word in enumerate(words):
        if word == "-m":
            assert words[place + 1] in known
        elif word.startswith("--"):
            assert f'"{word}"' in conftest
        elif word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).is_file()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns what looks like a checkout, with results of its own: two finished runs and their table."""
    place = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("results", ".git"):
            (place / entry.name).symlink_to(entry)
    (place / "results").mkdir()
    (place / "results" / "reference").symlink_to(ROOT / "results" / "reference")
    for name in RUNS:
        shutil.copytree(ROOT / SAMPLE / name, place / "results" / name)
    shutil.copy(ROOT / SAMPLE / "runs.csv", place / "results")
    yield place


def execute(command: Command, checkout: Path, *more: str, runs: tuple[str, ...] = RUNS) -> str:
    """Runs a command as a reader would, in ``checkout``; returns what it printed."""
    ids = iter(runs)
    words = [re.sub("RUN_ID", lambda _: next(ids), word) for word in command.words]
    if words[0] == "python":
        del words[0]
    elif words[0] == "deepspeed":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        words[:1] = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", port]
    given = dict(word.split("=", 1) for word in command.variables)
    if "tracking=mlflow" in words:
        given["PYTHONPATH"] = ""
    done = python(*words, *more, cwd=checkout, timeout=900, **given)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def made(checkout: Path, *words: str) -> Path:
    """Makes a run, and returns its directory."""
    before = set(checkout.glob("results/*/record.json"))
    execute(Command("", (), ("python", "harness/main.py", *words), frozenset()), checkout)
    (record,) = set(checkout.glob("results/*/record.json")) - before
    return record.parent


@pytest.mark.parametrize("command", names(QUICK))
def test_a_command_that_loads_no_model(command: Command, checkout: Path) -> None:
    assert execute(command, checkout)


def shortened(command: Command) -> Command:
    """Returns a command that takes few requests instead of all; ``verify --model`` judges two of a run's."""
    more: tuple[str, ...] = ()
    if "harness/main.py" in command.words:
        more = FEW
    elif "harness.accuracy" in command.words:
        more = FEW[:1]
    elif "--model" in command.words and "--samples" not in command.words:
        more = ("--samples", "2")
    return dataclasses.replace(command, words=command.words + more)


@pytest.mark.slow
@pytest.mark.parametrize("command", names([shortened(one) for one in SLOW if "resume=RUN_ID" not in one.words]))
def test_a_command_that_loads_a_model(command: Command, checkout: Path) -> None:
    execute(command, checkout)


@pytest.mark.slow
@pytest.mark.parametrize("command", names([command for command in SLOW if "resume=RUN_ID" in command.words]))
def test_a_run_that_was_cut_short_is_resumed(command: Command, checkout: Path) -> None:
    """One of four requests, whose last line is taken away as if it had been interrupted."""
    directory = made(checkout, "dataset.num_samples=4", FEW[1])
    lines = (directory / "completions.jsonl").read_text().splitlines(keepends=True)
    (directory / "completions.jsonl").write_text("".join(lines[:-1]))
    record = json.loads((directory / "record.json").read_text())
    record |= {"status": "interrupted", "error": "interrupted", "clock_s": record["elapsed_s"]}
    (directory / "record.json").write_text(json.dumps(record))
    assert "4 of 4 requests" in execute(command, checkout, runs=(directory.name,))
    assert len((directory / "completions.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param(one, marks=[pytest.mark.full] * (one in LONGER)) for one in sorted(SHORT)]
)
def test_a_benchmark_on_little(script: str, checkout: Path) -> None:
    """One of the commands shown for it, with what makes it short; of several rounds and variants, one and its own."""
    shown = next(command for command in SHOWN if not command.marks and script in command.words)
    more, runs = [word.format(results=checkout / "results") for word in SHORT[script]], RUNS
    if script == "launch/measure_rounding.py":
        runs = (made(checkout, "model.dtype=float32", *FEW).name,)
    assert execute(shown, checkout, *more, runs=runs)


# --- tables ---


def test_every_key_is_documented_and_no_other() -> None:
    tabled = {row[0].strip("`") for _, rows in tables(keys_tables.DOCUMENT) if rows[0][0] == "key" for row in rows[1:]}
    assert tabled == {key for name in catalogue.names() for key in keys_tables.option(f"engine={name}")} - {
        "engine.name"
    }


def test_keys_are_documented_as_the_schema_says() -> None:
    document = keys_tables.DOCUMENT.read_text()
    assert document == keys_tables.rewritten(document), "PYTHONPATH=.:tests python tests/support/keys_tables.py"


@pytest.mark.parametrize("name", catalogue.names())
def test_every_key_says_what_it_is_for(name: str) -> None:
    keys_tables.option()
    for key in [key for section in sections(registered()[name]).values() for key in section]:
        assert key.allowed, key.name
        assert 0 < len(key.meaning) <= 200 and not key.meaning.endswith("."), key.name


@pytest.mark.parametrize("group", ["engine", "model", "dataset", "generation", "parallel", "hardware", "experiment"])
def test_the_options_of_a_group_are_documented(group: str) -> None:
    rows = dict(rows for heading, table in tables(ROOT / "conf" / "README.md") if heading == "Groups" for rows in table)
    there = {
        path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if not path.stem.startswith(("tuned_", "local"))
    }
    assert set(re.findall(r"`(\w+)`", rows[f"`{group}`"])) == there


def test_columns_are_documented_in_their_order() -> None:
    (table,) = [rows for heading, rows in tables(ROOT / "results" / "README.md") if heading == "Columns of runs.csv"]
    assert tuple(row[0].strip("`") for row in table[1:]) == COLUMNS


# --- links ---


@pytest.mark.parametrize("document", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    text = "\n".join(line for _, line in parts(document)[1])
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS])
def test_files_named_in_sentences_are_there(document: Path) -> None:
    text = "\n".join(line for _, line in parts(document)[1])
    for path in re.findall(
        r"`((?:conf|harness|launch|tests)/[\w./-]+\.\w+|(?:conf|harness|launch|tests)/[\w./-]*/)`", text
    ):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
