"""The command line that goes on with what was interrupted, as a shell reads it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from harness.ranks.rank import PARENT_VARIABLE, RANK_VARIABLES
from harness.running import engine_sweep

# What would be said twice, or makes no sense when a user goes on by hand.
RUN_KEYS = ("resume", "requeue", "repeat", "repeat_until")


def resume_run(command_line: Sequence[str], run_id: str) -> str:
    """Returns what finishes a run.

    Args:
        command_line: the run's, from its record: the script and its overrides.
    """
    words = [word for word in command_line[1:] if word.partition("=")[0].lstrip("+") not in RUN_KEYS]
    return shlex.join([*_program(command_line[0]), *words, f"resume={run_id}"])


def resume_sweep() -> str:
    """Returns what does the jobs of this process's sweep, or the repetitions of its run, that are not done."""
    words = [engine_sweep.plain(word) for word in sys.argv[1:] if not word.startswith("sweep.resume=")]
    return shlex.join([*_program(sys.argv[0]), *words, "sweep.resume=true"])


def _program(script: str) -> list[str]:
    """Returns what stands before the overrides: Python's or DeepSpeed's launcher with its flags, or an own command."""
    if PARENT_VARIABLE not in os.environ and os.environ.keys() >= {*RANK_VARIABLES[:3]}:
        for parent in psutil.Process().parents()[:2]:
            try:
                words = parent.cmdline()
            except psutil.Error:
                continue
            if len(words) > 2 and Path(words[1]).name == "deepspeed" and script in words[2:]:
                return ["deepspeed", *words[2 : words.index(script, 2) + 1]]
    return ["python", script] if script.endswith(".py") else [Path(script).name]
