"""Compiles the C++ forward pass, once for each set of sources, compiler and instructions.

The sources need no header of torch or Python, so that g++ alone compiles them, in seconds; torch's own extension
builder brings its headers (a minute more), and a lock that a killed build leaves behind.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from harness.basics.cache import cache_root
from harness.basics.errors import UserError, one_line
from harness.basics.files import can_write
from harness.engines.fastgen.runners.native.checks import INSTRUCTION_SETS, instruction_set

SOURCES = Path(__file__).parent
# Hidden: the loader would give a second library, for other instructions, the first one's tables of functions.
OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
LIMIT_S = 300
STAGES = "HARNESS_STAGES"  # variable, and macro: the library is to take the time of each stage of a pass
# What stands for the sources where a compiler is only tried: the headers and the library that they need.
TRIAL = '#include <immintrin.h>\n#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'


class BuildError(Exception):
    """The library cannot be had on this machine; the message says why, in a line."""


def library(dtype: str = "bfloat16") -> Path:
    """Returns the library that computes a type, compiled first if need be; safe to call from several processes.

    The compiler is the one that ``CXX`` names, else ``g++``.

    Raises:
        BuildError: no compiler, a compiler too old, or no place to write.
    """
    from filelock import FileLock, Timeout

    command, final = _wanted(dtype)
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_suffix(".lock"), timeout=LIMIT_S):
            if not final.exists():
                _compile(command, SOURCES / "model.cpp", final)
    except (OSError, Timeout) as error:
        raise _no_room(final, error) from error
    return final


def ready() -> bool:
    """Returns whether the library is compiled already; where it is not, has the compiler try a few lines instead.

    Raises:
        BuildError: as :func:`library`, as far as it shows without compiling the sources.
    """
    command, final = _wanted("bfloat16")
    if final.exists():
        return True
    try:
        can_write(final.parent)
        with tempfile.TemporaryDirectory(prefix="harness-native-") as name:
            source = Path(name) / "trial.cpp"
            source.write_text(TRIAL)
            _compile(command, source, source.with_suffix(".so"))
    except OSError as error:
        raise _no_room(final, error) from error
    return False


def _wanted(dtype: str) -> tuple[list[str], Path]:
    """Returns the compiler with its options, and the file that the library is kept in; raises BuildError."""
    wish = shlex.split(os.environ.get("CXX") or "g++")
    program = shutil.which(wish[0]) if wish else None
    if program is None:
        raise BuildError(f"no C++ compiler: {' '.join(wish)} is not installed (CXX names another)")
    # Named one by one: what -march=native means would depend on where the cache directory was filled.
    names = INSTRUCTION_SETS[instruction_set(dtype) or list(INSTRUCTION_SETS)[-1]]
    options = [f"-m{name.replace('amx_', 'amx-').replace('_', '')}" for name in names]
    timed = [f"-D{STAGES}"] if os.environ.get(STAGES) else []
    command = [program, *wish[1:], *OPTIONS, *options, *timed]
    try:
        return command, cache_root() / "native" / f"{_fingerprint(command)}.so"
    except UserError as error:
        raise BuildError(f"no directory for the compiled kernels: {error}") from error


def _no_room(final: Path, error: Exception) -> BuildError:
    return BuildError(f"{final.parent} cannot hold the compiled kernels: {one_line(str(error), 200)}")


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join([*command, _run([command[0], "--version"]).stdout]).encode())
    return digest.hexdigest()[:20]


def _compile(command: list[str], source: Path, final: Path) -> None:
    unfinished = final.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = _run([*command, str(source), "-o", str(unfinished)])
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            reason = one_line(complaint, 200) or f"it ended with status {done.returncode}"
            raise BuildError(f"{command[0]} cannot compile the kernels: {reason}")
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
