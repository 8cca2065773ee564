"""Runs of one rank in processes that need not import PyTorch and transformers: forked from one that has.

A run takes five seconds to import them and, of a tiny model, less to do its work. The harness's own modules are
imported anew in each process, and ``harness/main.py`` is begun as Python begins it; it has its own arguments,
environment, working directory and output. Where it matters how a process comes to be, or what it inherits, tests start
one as a user does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["torch", "transformers", "transformers.models.llama.modeling_llama"]


@cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _become(words: list[str], directory: Path, variables: dict[str, str], output: str, errors: str) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((0, os.devnull), (1, output), (2, errors)):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("harness", "support", "conftest")]:
        del sys.modules[name]
    module = words[0] == "-m"
    first = directory if module else (directory / words[0]).parent
    tests = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [str(first), *(place for place in sys.path if not place.startswith(tests))]
    if module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run(
    words: list[str], directory: Path, variables: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Returns how Python's ``words`` ended, as :func:`subprocess.run` would with ``text`` and ``capture_output``.

    Args:
        words: ``harness/main.py`` and its arguments, or ``-m``, a module and its arguments.
        variables: the environment, but for what libraries read when they are imported.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = _forks().Process(target=_become, args=(words, directory, variables, *map(str, files)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, files[0].read_text(), files[1].read_text())
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))
