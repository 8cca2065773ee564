"""``harness/main.py`` in this process, for command lines that it answers or refuses before any rank is started."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

from harness.running import launcher, start
from support.runs import ROOT, variables


class Launched(BaseException):
    """A job that nothing is wrong with was about to start its ranks."""


@contextlib.contextmanager
def entry() -> Iterator[ModuleType]:
    """Yields ``harness.main``, whose launches end where the ranks would start; what it changes is put back."""
    interrupt = signal.getsignal(signal.SIGINT)
    with mock.patch.object(sys, "path", list(sys.path)), mock.patch.dict(os.environ):
        import harness.main

        with (
            mock.patch.object(launcher, "watch", side_effect=Launched),
            mock.patch.object(start, "_become_the_rank", side_effect=Launched),
        ):
            try:
                yield harness.main
            finally:
                signal.signal(signal.SIGINT, interrupt)


def begin_anew() -> None:
    """Makes of the next ``main()`` the first of its process."""
    GlobalHydra.instance().clear()


def answered(*words: str, directory: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Returns what ``python harness/main.py`` says to ``words``, in the environment of :func:`variables`."""
    output, errors = io.StringIO(), io.StringIO()
    begin_anew()
    with (
        entry() as main,
        contextlib.chdir(directory),
        mock.patch.dict(os.environ, variables(**environment), clear=True),
        mock.patch.object(sys, "argv", ["harness/main.py", *words]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            status = main.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(sys.argv, status, output.getvalue(), errors.getvalue())
