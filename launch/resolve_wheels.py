"""What a machine lacks, found by pip: a stand-in of that machine is made, and pip says what it would install there."""

from __future__ import annotations

import configparser
import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from harness.basics.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
KERNELS, MII = "deepspeed-kernels", "deepspeed-mii"  # taken without what they declare, see launch/constraints-mii.txt
# What setup.cfg asks for and such a machine can do without.
LEFT_OUT = {
    "vl-convert-python": "for the charts of --html alone",
    "pyarrow": "for datasets in Parquet and compare --parquet",
    "jsonschema": "for tests of the documents alone",
    "mlflow-skinny": "for tracking=mlflow alone",
    "submitit": "for hydra/launcher=slurm alone",
    "import-linter": "for lint",
    "mypy": "for lint",
    "ruff": "for lint",
}
NEWEST = "9999"  # of a package whose version nobody said: new enough for whatever asks
LIST = "give what pip list --format=freeze wrote"
GLIBC = (2, 28)  # what torch's own wheels ask of the machine
Present = Mapping[str, str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What the project needs: requirements for pip, and versions of packages that are taken without dependencies."""

    requirements: tuple[str, ...]
    alone: Mapping[str, str]


def read_present(path: Path, torch: str) -> dict[str, str | None]:
    """Returns the packages of a list (``NAME``, ``NAME==VERSION`` or pip's ``NAME @ URL``) with their versions.

    Raises:
        UserError: the file cannot be read, a line is no package, or torch is not there or is another than ``torch``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--present", f"{path} cannot be read ({error})", LIST) from error
    present: dict[str, str | None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-e "):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:==(\S+)| @ \S+)?", text)
        if match is None:
            found = f"{path}, line {number}: {text!r} is no package"
            raise UserError("--present", found, LIST)
        present[canonicalize_name(match[1])] = match[2]
    if "torch" not in present:
        raise UserError("--present", f"{path} lists no torch", "give the list of a machine that has it")
    listed = present["torch"]
    if listed is not None and Version(listed).base_version != Version(torch).base_version:
        raise UserError("--torch", f"{torch}, but {path} lists torch {listed}", "give that version, or another list")
    return present | {"torch": torch}


def read_wanted(present: Present, setup: Path = ROOT / "setup.cfg") -> Wanted:
    """Returns what setup.cfg and launch/constraints-mii.txt ask for: to run, to test on a GPU, and for both kernels."""
    settings = configparser.ConfigParser()
    settings.read(setup, encoding="utf-8")
    lines = settings["options"]["install_requires"].split("\n") + settings["options.extras_require"]["test"].split("\n")
    ours = [line for line in lines if line and canonicalize_name(Requirement(line).name) not in LEFT_OUT]
    pins = read_pins(ROOT / "launch" / "constraints-mii.txt")
    alone = {name: pins[name] for name in (KERNELS, MII) if name not in present}
    return Wanted((*ours, *(name for name in pins if name not in (KERNELS, MII))), alone)


def read_pins(*files: Path) -> dict[str, str]:
    """Returns the versions of constraints files by package."""
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version for name, mark, version in (one.partition("==") for one in lines) if mark}


def tools(directory: Path, python: str) -> Path:
    """Makes an environment with pip and wheel, and returns its interpreter."""
    _environment(directory, python)
    interpreter = directory / "bin" / "python"
    pip(interpreter, "install", "wheel")
    return interpreter


def stand_in(directory: Path, python: str, present: Present, pins: Mapping[str, str]) -> Path:
    """Makes an environment in which pip sees the packages of ``present``, and nothing of them is.

    Args:
        pins: versions to assume where ``present`` has none.

    Returns:
        Its interpreter.
    """
    _environment(directory, python, "--without-pip")
    (packages,) = directory.glob("lib/python*/site-packages")
    for name, version in present.items():
        version = version or pins.get(name, NEWEST)
        about = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return directory / "bin" / "python"


def _environment(directory: Path, python: str, *more: str) -> None:
    done = subprocess.run([python, "-m", "venv", *more, str(directory)], capture_output=True, text=True)
    if done.returncode != 0:
        found = f"{python} makes no environment ({one_line(done.stdout + done.stderr)[-200:]})"
        raise UserError("PYTHON", found, "install its venv module, or set PYTHON to another")


def resolve(tools: Path, python: Path, wanted: Wanted, constraints: Mapping[str, str]) -> dict[str, str]:
    """Returns the packages, with versions, that pip would install where those of a stand-in are.

    Args:
        tools: an interpreter with pip, of the version asked for.
        python: the stand-in's interpreter.
        constraints: versions of what the stand-in lacks.

    Raises:
        UserError: there is no such set, not with that torch, or pip reaches no index.
    """
    with tempfile.TemporaryDirectory() as name:
        report, pinned = Path(name) / "report.json", Path(name) / "constraints.txt"
        pinned.write_text("".join(f"{package}=={version}\n" for package, version in constraints.items()))
        words = ("install", "--quiet", "--dry-run", "--report", str(report), "-c", str(pinned))
        pip(tools, "--python", str(python), *words, *wanted.requirements)
        installs = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    found: dict[str, str] = {canonicalize_name(one["name"]): one["version"] for one in installs}
    if "torch" in found:
        found_there = "the one given is older than setup.cfg asks for"
        raise UserError("--torch", found_there, "give the version of a machine that can run the project")
    return dict(sorted({**found, **wanted.alone}.items()))


def build(tools: Path, packages: Mapping[str, str], directory: Path) -> set[str]:
    """Fetches the wheels of ``packages`` into ``directory``, and builds those that are to be had as sources alone.

    Returns:
        The packages that were built.
    """
    pinned = (f"{name}=={version}" for name, version in packages.items())
    said = pip(tools, "wheel", "--no-deps", "--wheel-dir", str(directory), *pinned)
    built = re.findall(r"^Building wheels for collected packages: (.*)$", said, re.MULTILINE)
    return {canonicalize_name(name) for line in built for name in line.split(", ")}


def pip(tools: Path, *words: str) -> str:
    """Runs pip; returns what it said, or UserError has its error."""
    command = [str(tools), "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    # DeepSpeed's kernels are compiled where the GPU is.
    done = subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError("packages", one_line(said, 300), "make pip reach an index that has them")
    return done.stdout


def check_tags(wheels: Iterable[Path], python: str, machine: str) -> None:
    """Refuses wheels that may not run on another machine of the kind.

    Args:
        python: its Python, such as ``3.12``.
        machine: its processor's name, such as ``x86_64``.
    """
    version = tuple(int(part) for part in python.split("."))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC[1], 4, -1)]
    platforms += [f"manylinux{name}_{machine}" for name in ("2014", "2010", "1")]
    fit: set[Tag] = {*cpython_tags(version, platforms=platforms), *compatible_tags(version, platforms=platforms)}
    for wheel in wheels:
        tags = parse_wheel_filename(wheel.name)[3]
        if not tags & fit:
            found = f"{wheel.name} does not fit Python {python} on Linux {machine} with glibc {GLIBC[0]}.{GLIBC[1]}"
            raise UserError("packages", found, "pin another version in launch/constraints.txt")


def without_library(wheel: Path, member: str, tools: Path) -> None:
    """Puts in the place of a wheel one without ``member``, with the build number 1; ``tools`` has the package wheel."""
    python, abi, system = wheel.stem.split("-")[-3:]
    with tempfile.TemporaryDirectory() as name:
        _wheel(tools, "unpack", "-d", name, str(wheel))
        (unpacked,) = Path(name).iterdir()
        (unpacked / member).unlink()
        _wheel(tools, "pack", "-d", name, str(unpacked))
        (packed,) = Path(name).glob("*.whl")
        # As its name says: deepspeed-kernels names the Python of its maker in its own file WHEEL.
        tags = ("--python-tag", python, "--abi-tag", abi, "--platform-tag", system, "--build", "1")
        _wheel(tools, "tags", "--remove", *tags, str(packed))
        (packed,) = Path(name).glob("*.whl")
        shutil.move(packed, wheel.parent / packed.name)
    wheel.unlink()


def _wheel(tools: Path, *words: str) -> None:
    subprocess.run([str(tools), "-m", "wheel", *words], capture_output=True, check=True)
