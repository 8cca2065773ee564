"""Compiles the C++ forward pass, once for each set of sources, compiler and instructions.

The sources need no header of torch or Python, so that g++ alone compiles them, in seconds; torch's own extension
builder brings its headers (a minute more), and a lock that a killed build leaves behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from harness.demo_model import cache_root
from harness.engines.fastgen.native.checks import BFLOAT16, INSTRUCTIONS
from harness.environment import cpu_flags
from harness.errors import one_line

SOURCES = Path(__file__).parent
OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w")
LIMIT_S = 300


class BuildError(Exception):
    """The library cannot be had on this machine; the message says why, in a line."""


def library() -> Path:
    """Returns the compiled library, compiled first if need be; safe to call from several processes.

    The compiler is the one that ``CXX`` names, else ``g++``.

    Raises:
        BuildError: no compiler, a compiler too old, or no place to write.
    """
    from filelock import FileLock, Timeout

    wish = os.environ.get("CXX") or "g++"
    compiler = shutil.which(wish)
    if compiler is None:
        raise BuildError(f"no C++ compiler: {wish} is not installed (CXX names another)")
    # Named one by one: what -march=native means would depend on where the cache directory was filled.
    names = [*INSTRUCTIONS, *([BFLOAT16] if BFLOAT16 in cpu_flags() else [])]
    options = [*OPTIONS, *(f"-m{name.replace('_', '')}" for name in names)]
    final = cache_root() / "native" / f"{_fingerprint(compiler, options)}.so"
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_suffix(".lock"), timeout=LIMIT_S):
            if not final.exists():
                _compile([compiler, *options], final)
    except (OSError, Timeout) as error:
        raise BuildError(f"{final.parent} cannot hold the compiled kernels: {one_line(str(error), 200)}") from error
    return final


def _fingerprint(compiler: str, options: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = _run([compiler, "--version"]).stdout
    digest.update("\0".join([compiler, version, *options]).encode())
    return digest.hexdigest()[:20]


def _compile(command: list[str], final: Path) -> None:
    unfinished = final.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = _run([*command, str(SOURCES / "model.cpp"), "-o", str(unfinished)])
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise BuildError(f"{command[0]} cannot compile the kernels: {one_line(complaint, 200)}")
        os.replace(unfinished, final)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {one_line(str(error), 200)}") from error
