"""Processes that are started early and heard later, each for so long and no longer."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from harness.basics.errors import one_line
from harness.basics.places import import_path


class Background:
    """A Python program of ours that answers in JSON lines; it ends with whoever ends our process group.

    Args:
        module: what ``python -m`` runs.
    """

    def __init__(self, module: str, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | import_path(),
        )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last = ""  # line that it wrote to standard error
        for read in (self._read_answers, self._read_errors):
            threading.Thread(target=read, daemon=True).start()

    def ask(self, question: dict[str, Any]) -> bool:
        """Sends a line; returns False where nobody reads it any more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def answer(self, until: float) -> dict[str, Any] | None:
        """Returns the next line; None where the process has ended, or it is later than ``until`` (time.monotonic)."""
        try:
            return self._answers.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            return None

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def ended(self) -> str:
        """Returns, in a clause, how it ended; waits a moment for it."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it does not end"
        if status < 0:
            return f"Python was ended by {signal.Signals(-status).name}"
        return one_line(self._last, 300) or f"Python ended with status {status}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # a library's
            if isinstance(found, dict):
                self._answers.put(found)
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if text := line.decode(errors="replace").strip():
                self._last = text
