"""The C++ kernels' compilation: once, for this processor, and what becomes of it where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.engines import generate, hugging_face, requests, settings
from support.machine import needs_native
from support.runs import ROOT, variables

from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.native import build, checks

pytestmark = pytest.mark.usefixtures("one_thread")


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_what_the_compiler_says_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = script(
        tmp_path / "old",
        "echo 'cc1plus: warning: is old' >&2",
        "echo 'error: what is' $2 >&2",
        "echo more >&2",
        "exit 1",
    )
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError) as failed:
        build.library()
    assert str(failed.value) == f"{compiler} cannot compile the kernels: error: what is -std=c++17"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix not in ("", ".lock")]


def test_a_cache_that_cannot_be_written_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = [tmp_path / "file", tmp_path / "readable"]
    places[0].write_text("in the way")
    places[1].mkdir(mode=0o500)
    for place in places[: 1 if os.geteuid() == 0 else 2]:  # root writes everywhere
        monkeypatch.setenv("HARNESS_CACHE", str(place))
        with pytest.raises(build.BuildError) as failed:
            build.library()
        assert str(failed.value).startswith(f"{place}/native cannot hold the compiled kernels: ")
        assert "\n" not in str(failed.value)


@needs_native
def test_a_library_that_cannot_be_loaded_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that writes something else; torch takes over."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "CXX",
        str(script(tmp_path / "odd", '[ "$1" = --version ] || { for last; do :; done; echo rubbish > "$last"; }')),
    )
    engine = FastGenEngine(settings(kernels=Kernels.auto))
    assert engine.kernels == "torch"
    (note,) = engine.notes
    assert "the compiled kernels cannot be loaded: " in note


PLAIN = {"avx2", "fma"}
BUILDER = f"""
import json, os, sys
sys.path.insert(0, os.getcwd())
from harness.engines.fastgen.runners.native import build, checks
checks.cpu_flags = lambda: {PLAIN!r}
path = build.library()
print(json.dumps([str(path), path.stat().st_mtime_ns]))
"""


@dataclasses.dataclass(frozen=True)
class Built:
    """What two processes did that wanted the library at once, on a processor with AVX2 alone."""

    environment: dict[str, str]
    answers: list[list[Any]]  # path and time of change, as each process saw them
    calls: Path  # the compiler's command lines

    @property
    def compilations(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "model.cpp" in line]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("built")
    calls = place / "calls"
    real = shutil.which(os.environ.get("CXX") or "g++")
    compiler = script(place / "compiler", f'echo "$@" >> "{calls}"', f'exec "{real}" "$@"')
    environment = {"HARNESS_CACHE": str(place / "cache"), "CXX": str(compiler)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER], cwd=ROOT, env=variables(**environment), stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    return Built(environment, [json.loads(output) for output, _ in outcomes], calls)


@pytest.fixture
def plain_processor(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX2 alone, and the library for it."""
    for name, value in built.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checks, "cpu_flags", lambda: PLAIN)


def test_processes_compile_once_between_them_and_never_again(built: Built, plain_processor: None) -> None:
    assert built.answers[0] == built.answers[1]
    (command,) = built.compilations
    assert "-mavx2 -mfma" in command and "avx512" not in command
    path = build.library()
    assert [str(path), path.stat().st_mtime_ns] == built.answers[0]
    assert built.compilations == [command]
    assert {found.suffix for found in path.parent.iterdir()} <= {".so", ".lock"}
    assert len(list(path.parent.glob("*.so"))) == 1


@needs_native
def test_a_processor_without_avx512_computes_both_types(plain_processor: None, built: Built) -> None:
    chosen, jobs = settings(kernels=Kernels.auto, kv_memory="4MiB"), requests(8)
    engine = FastGenEngine(chosen)
    assert (engine.kernels, engine.notes, engine.facts) == ("native", [], {"instruction_set": "avx2"})
    engine.load()
    found = generate(engine, jobs)
    assert {index: completion.token_ids for index, completion in found.items()} == hugging_face(chosen.source, jobs)
    assert len(built.compilations) == 1
    narrow = FastGenEngine(dataclasses.replace(chosen, dtype="bfloat16"))
    assert (narrow.kernels, narrow.notes) == ("native", [])
    assert len(built.compilations) == 1
