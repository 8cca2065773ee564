"""The packages that the harness asks for: there, and of a version that it was written for; imports none of them."""

from __future__ import annotations

import configparser
import importlib.metadata

from harness.basics.places import CHECKOUT, ROOT
from harness.doctor.findings import Findings

AREA = "packages"
NEEDED = ("filelock", "hydra-core", "omegaconf", "psutil", "pyyaml")  # without these no config can be composed
PACKAGE = "deepspeed-llama-harness"
INSTALL = "run bash launch/setup.sh" if CHECKOUT else "install the wheel"
SET_UP = f"{INSTALL}, and use .venv/bin/python" if CHECKOUT else f"{INSTALL} with its dependencies"


def asked() -> list[str]:
    """Returns what the harness requires: the lines of ``install_requires``."""
    if not CHECKOUT:
        return [line for line in importlib.metadata.requires(PACKAGE) or [] if "extra ==" not in line]
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser.get("options", "install_requires", fallback="").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def composable() -> bool:
    """Whether the packages are there without which no config can be composed."""
    return not set(NEEDED) & set(_state()[0])


def check(found: Findings) -> None:
    """Says which packages are missing, or of another version."""
    missing, others = _state()
    if missing:
        found.no(AREA, f"not installed: {', '.join(missing)}", SET_UP)
    if others:
        found.note(AREA, f"of a version that the code is not written for: {', '.join(others)}", SET_UP)
    if not missing and not others:
        found.ok(AREA, f"all {len(asked())} that the harness asks for are installed, in versions that it admits")


def _state() -> tuple[list[str], list[str]]:
    """Returns the packages that are missing, and those of a version that is not admitted."""
    missing, others = [], []
    for line in asked():
        name = _name(line)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not _admits(line, version):
            others.append(f"{name} {version} (written for {line.removeprefix(name)})")
    return missing, others


def _name(line: str) -> str:
    return line.partition(">")[0].partition("=")[0].partition("<")[0].strip()


def _admits(line: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(line).specifier.contains(version, prereleases=True)
