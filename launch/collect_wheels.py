"""Fills a folder with what a GPU machine without a network lacks: wheels, and the demo model cut into parts.

    bash launch/collect_wheels.sh --python 3.12 --torch 2.11+cu130 --out DIR
        [--part-size 60M | --no-model] [--present FILE]

Left in DIR: wheels/, model/, SHA256SUMS of all of it and of the model's joined weights, and join.sh, which joins them.
What is lacking there is what setup.cfg and launch/constraints-mii.txt ask for and --present does not list, as pip
resolves it, in the versions of launch/constraints.txt. PYTHON=... is an interpreter of that version.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import resolve_wheels
from packaging.version import InvalidVersion, Version

from harness.basics.errors import UserError, report
from harness.models import demo

LAUNCH = ROOT / "launch"
PRESENT = LAUNCH / "present-gpu-image.txt"
SUMS, JOIN = "SHA256SUMS", "join.sh"
WEIGHTS = "model.safetensors"
OURS = {"wheels", "model", SUMS, JOIN}
# deepspeed-kernels has the library of mixture-of-experts and mixed-precision products too, two thirds of it. DeepSpeed
# links it into inference_cutlass_ops alone (op_builder/inference_cutlass_builder.py), which nothing here builds.
UNUSED = "dskernels/libdeepspeedft.so"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}  # as split -b has them


def main(arguments: list[str]) -> int:
    """Collects; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, metavar="3.12", help="that machine's Python")
    parser.add_argument("--torch", required=True, metavar="2.11+cu130", help="that machine's PyTorch")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder to fill")
    parser.add_argument("--part-size", default="60M", metavar="60M", help="of the model's parts, at most")
    parser.add_argument("--present", default=PRESENT, metavar="FILE", type=Path, help="what it has: pip list's lines")
    parser.add_argument("--no-model", action="store_true", help="without the demo model, where every megabyte counts")
    options = parser.parse_args(arguments)
    try:
        size = part_size(options.part_size)
        present = resolve_wheels.read_present(options.present, version("--torch", options.torch))
        python = interpreter(options.python)
        directory = prepared(options.out)
        built = collect_wheels(directory / "wheels", python, options.python, present)
        if not options.no_model:
            collect_model(demo.ensure(), directory / "model", size)
        shutil.copy(LAUNCH / JOIN, directory / JOIN)
        write_sums(directory, None if options.no_model else demo.ensure() / WEIGHTS)
        print("\n".join(table(directory, built, present)))
    except UserError as error:
        return report(error)
    except OSError as error:
        return report(
            UserError("--out", f"{options.out} cannot be filled ({error})", "make it writable, or free space")
        )
    return 0


def part_size(text: str) -> int:
    """Returns the bytes of ``60M`` and the like."""
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)", text)
    if match is None:
        raise UserError("--part-size", repr(text), "give a number of bytes, or one with K, M or G behind it")
    return int(match[1]) * UNITS[match[2]]


def version(option: str, text: str) -> str:
    """Returns ``text`` as a version with three parts, as packages write it: 2.11+cu130 is 2.11.0+cu130."""
    try:
        found = Version(text)
    except InvalidVersion:
        raise UserError(option, f"{text!r} is no version", "give one such as 2.11+cu130") from None
    release = ".".join(str(part) for part in (*found.release, 0, 0)[:3])
    return release + (f"+{found.local}" if found.local else "")


def interpreter(wanted: str) -> str:
    """Returns an interpreter of version ``wanted``: what is lacking depends on it."""
    if re.fullmatch(r"3\.[0-9]+", wanted) is None:
        raise UserError("--python", repr(wanted), "give a version such as 3.12")
    name = os.environ.get("PYTHON") or f"python{wanted}"
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    # Where pyenv answers to the name, it must be told which.
    variables = {"PYENV_VERSION": wanted} | os.environ
    try:
        done = subprocess.run([name, "-c", code], env=variables, capture_output=True, text=True)
        found, _, path = done.stdout.strip().partition(" ")
    except OSError:
        found, path = "", ""
    if found != wanted:
        here = f"{name} is Python {found}" if found else f"no {name} here"
        raise UserError("--python", f"{wanted}, but {here}", f"install Python {wanted}, or set PYTHON to one")
    return path


def prepared(directory: Path) -> Path:
    """Returns the folder, emptied of what an earlier call left; UserError if it has something else."""
    others = sorted({path.name for path in directory.iterdir()} - OURS) if directory.is_dir() else []
    if others:
        raise UserError("--out", f"{directory} holds {others[0]}", "name a new folder, or one that this has filled")
    for name in sorted(OURS):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in ("wheels", "model"):
        (directory / name).mkdir(parents=True)
    return directory


def collect_wheels(directory: Path, python: str, wanted: str, present: resolve_wheels.Present) -> set[str]:
    """Fills ``directory`` with wheels for Python ``wanted`` of what is not ``present``; returns what was built here."""
    pins = resolve_wheels.read_pins(LAUNCH / "constraints.txt", LAUNCH / "constraints-mii.txt")
    with tempfile.TemporaryDirectory() as name:
        say("asking pip what is lacking there...")
        place = resolve_wheels.stand_in(Path(name) / "there", python, present, pins)
        tools = resolve_wheels.tools(Path(name) / "tools", python)
        absent = {package: version for package, version in pins.items() if package not in present}
        packages = resolve_wheels.resolve(tools, place, resolve_wheels.read_wanted(present), absent)
        say(f"fetching {len(packages)} packages...")
        built = resolve_wheels.build(tools, packages, directory)
        for wheel in directory.glob("deepspeed_kernels-*.whl"):
            resolve_wheels.without_library(wheel, UNUSED, tools)
    resolve_wheels.check_tags(directory.iterdir(), wanted, platform.machine())
    return built


def collect_model(source: Path, directory: Path, size: int) -> None:
    """Copies a checkpoint's files from ``source``, its weights in parts of at most ``size`` bytes."""
    for path in sorted(source.iterdir()):
        if path.name != WEIGHTS:
            shutil.copy(path, directory / path.name)
    with (source / WEIGHTS).open("rb") as weights:
        for number in range(1, 10000):
            with (directory / f"model-{number:04d}.part").open("wb") as part:
                left = size
                while left > 0 and (data := weights.read(min(left, 1 << 20))):
                    left -= part.write(data)
            if weights.tell() == (source / WEIGHTS).stat().st_size:
                return
    raise UserError("--part-size", f"{size} bytes make more than 9999 parts", "give a larger one")


def write_sums(directory: Path, weights: Path | None) -> None:
    """Writes SHA256SUMS: every file of the folder, and the weights, if there are any, as they are when joined."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    if weights is not None:
        files[f"model/{WEIGHTS}"] = weights
    lines = []
    for name in sorted(files):
        with files[name].open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (directory / SUMS).write_text("".join(lines))


def table(directory: Path, built: set[str], present: resolve_wheels.Present) -> list[str]:
    """Returns the lines that say what lies in the folder, and how large it is."""
    lines, total = [], 0
    for part in ("wheels", "model"):
        files = sorted((directory / part).iterdir())
        sizes = [path.stat().st_size for path in files]
        for path, size in zip(files, sizes, strict=True):
            package = resolve_wheels.canonicalize_name(path.name.split("-")[0])
            note = "  built here" if part == "wheels" and package in built else ""
            note = "  without its " + UNUSED.split("/")[1] if package == resolve_wheels.KERNELS else note
            lines.append(f"{size / 1e6:9.2f} MB  {part}/{path.name}{note}")
        lines.append(f"{sum(sizes) / 1e6:9.2f} MB  {len(files)} files in {part}/")
        total += sum(sizes)
    lines.append(f"{total / 1e6:9.2f} MB  in all, in {directory}")
    lines += [f"left out: {name}, {why}" for name, why in resolve_wheels.LEFT_OUT.items() if name not in present]
    return lines


def say(line: str) -> None:
    """Tells the user what takes long."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
