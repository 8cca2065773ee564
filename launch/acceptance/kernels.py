"""Compiled kernels between machines: packed at the end, restored at the start; a fresh machine then compiles nothing.

Ninja leaves an extension alone whose files are newer than its sources and not newer than its own notes say: the archive
keeps times, rounded down, and gpu_acceptance.sh gives the sources an old date as it installs them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

from acceptance.here import ROOT, capabilities
from harness.basics.errors import UserError, one_line
from harness.basics.files import replace
from harness.machine import build_locks

VARIABLE = "ACCEPTANCE_KERNELS"
FOLDER = "compiled"  # of the acceptance's own; no stage has this name
KEY, PLACE = "made_with.json", ".place"
PACKAGES = ("torch", "triton", "deepspeed", "deepspeed-kernels")


def made_with() -> dict[str, object]:
    """Returns what compiled kernels hold for."""
    found: dict[str, object] = {"python": platform.python_version(), "root": str(ROOT), "capabilities": capabilities()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"nvcc": compiler("nvcc"), "g++": compiler("g++")}


def compiler(name: str) -> str | None:
    """Returns the line of a compiler's ``--version`` that has its version, None where it is not there."""
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    program = shutil.which(name) or shutil.which(name, path=str(Path(cuda, "bin")))
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
    lines = [line for line in done.stdout.splitlines() if any(character.isdigit() for character in line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "")


def restore(folder: Path) -> str:
    """Unpacks the archive that ACCEPTANCE_KERNELS names, unless this folder was filled on this machine before.

    Returns:
        What was done, for the driver to print; empty where no archive is given.

    Raises:
        UserError: the archive cannot be read.
    """
    archive = os.environ.get(VARIABLE)
    if not archive:
        return ""
    if (folder / PLACE).exists() and (folder / PLACE).read_text() == _place(folder):
        return f"{VARIABLE}: {folder} was filled here before"
    try:
        with tarfile.open(archive) as packed:
            member = packed.extractfile(KEY)
            theirs, ours = json.load(member) if member else {}, made_with()
            if theirs != ours:
                other = [f"{key} {theirs.get(key)}, here {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
                return f"{VARIABLE}: compiled with {other[0] if other else 'something else'}: not used"
            folder.mkdir(parents=True, exist_ok=True)
            if hasattr(tarfile, "data_filter"):
                packed.extractall(folder, filter="data")
            else:  # Python before 3.11.4; the archive is one that this program wrote
                packed.extractall(folder)
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(VARIABLE, one_line(f"{archive}: {error}"), "unset it to compile anew") from error
    mark(folder)
    return f"{VARIABLE}: compiled kernels restored"


def mark(folder: Path) -> None:
    """Notes that the folder's kernels are of this machine: a copy of it on another one does not look the same."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / PLACE, _place(folder).encode())


def _place(folder: Path) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.exists() else ''} {folder.stat().st_ino}"


def pack(folder: Path, archive: Path) -> int | None:
    """Packs what was compiled; returns the archive's bytes, None where nothing was."""
    if not any(folder.glob("*/*")):
        return None
    replace(folder / KEY, json.dumps(made_with(), indent=1).encode())
    unfinished = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(unfinished, "w:gz", compresslevel=1) as packed:
        packed.add(folder / KEY, KEY)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in (KEY, PLACE, build_locks.LOCK):
                packed.add(path, str(path.relative_to(folder)), filter=_whole_seconds)
    os.replace(unfinished, archive)
    return archive.stat().st_size


def _whole_seconds(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = int(member.mtime)
    return member


def clear_locks(environment: dict[str, str]) -> list[str]:
    """Takes away locks of builds that were killed; returns the extensions' names.

    Args:
        environment: of the stages, which says where torch builds.
    """
    given = environment.get("TORCH_EXTENSIONS_DIR")
    folders = Path(given).glob("*/") if given else Path.home().glob(".cache/torch_extensions/*/*/")
    return [folder.name for folder in folders if build_locks.clear(folder)]
