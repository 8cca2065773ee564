"""The image's files: what they copy is there, both are made alike, and what they start is what the package installs."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "launch" / "container"
DOCKERFILE = (PLACE / "Dockerfile").read_text()
DEFINITION = (PLACE / "harness.def").read_text()
INSTALL = (PLACE / "install.sh").read_text()
MADE = "dist/*.whl"  # by the command that all of them name first
WHEEL = "pip wheel --no-deps -w dist ."


def setup(section: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser[section]


def copied() -> dict[str, list[str]]:
    """Returns what each of the two takes from the checkout."""
    (line,) = re.findall(r"^COPY (.+)$", DOCKERFILE, re.M)
    files = DEFINITION.partition("%files\n")[2].partition("\n\n")[0]
    return {"Dockerfile": line.split()[:-1], "harness.def": [row.split()[0] for row in files.splitlines()]}


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    taken = copied()
    assert taken["Dockerfile"] == taken["harness.def"]
    for path in taken["Dockerfile"]:
        assert path == MADE or (ROOT / path).is_file(), path
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line[1:] for line in lines if line.startswith("!")] == taken["Dockerfile"] and "*" in lines


def test_both_are_made_of_one_base_by_one_script() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert f"From: {base}\n" in DEFINITION and "-devel-" in base  # nvcc is in no other
    run = "bash /opt/source/install.sh /opt/source /opt/harness"
    assert f"RUN {run} &&" in DOCKERFILE and f"    {run}\n" in DEFINITION
    assert WHEEL in DOCKERFILE and WHEEL in DEFINITION and WHEEL in INSTALL
    assert WHEEL in (ROOT / "launch" / "README.md").read_text()


def test_the_script_installs_what_there_is() -> None:
    assert subprocess.run(["bash", "-n", str(PLACE / "install.sh")]).returncode == 0
    (extras,) = re.findall(r"\[([a-z,]+)\]\"", INSTALL)
    assert set(extras.split(",")) <= set(setup("options.extras_require"))
    for name in re.findall(r"\$source/(constraints\S*?\.txt)", INSTALL):
        assert f"launch/{name}" in copied()["Dockerfile"]


def test_what_an_image_starts_is_a_command_of_the_package() -> None:
    commands = [
        line.partition("=")[0].strip() for line in setup("options.entry_points")["console_scripts"].splitlines()
    ]
    started = re.findall(r'ENTRYPOINT \["([^"]+)"', DOCKERFILE) + re.findall(r"(?:exec |bin/)(llama\S+)", DEFINITION)
    assert len(started) == 3 and set(started) <= set(commands)


@pytest.mark.parametrize("wheels", [[], ["a.whl", "b.whl"]])
def test_a_source_without_one_wheel_is_refused_before_anything_is_installed(tmp_path: Path, wheels: list[str]) -> None:
    for name in wheels:
        (tmp_path / name).touch()
    words = ["bash", str(PLACE / "install.sh"), str(tmp_path), str(tmp_path / "venv")]
    done = subprocess.run(words, env={"PATH": ""}, capture_output=True, text=True, executable="/bin/bash")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs one wheel" in done.stderr
    assert not (tmp_path / "venv").exists()
