"""The Slurm job that this process is a part of: which it is, what becomes of it, and how it is queued again.

Slurm sends SIGTERM to a job that is preempted, cancelled or over its time, and before that whatever ``--signal`` asks
for. Which of these it was, ``scontrol`` knows (tried with Slurm 22.05): a job in its grace time is still running, one
that Slurm itself will start again has a restart more than this process knows of.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from harness.basics import files
from harness.basics.errors import one_line

FOLDER = ".slurm"  # in results_dir
ASK_S = 10.0  # for the controller to answer
TRIES = 5  # as Slurm signals all processes of a job, several times, it ends the one that asks as well


class Fate(Enum):
    """What becomes of a job that was sent a signal."""

    RUNNING = auto()  # nothing yet: it can be queued again
    AGAIN = auto()  # Slurm starts it again by itself
    TIME_LIMIT = auto()
    ENDED = auto()  # cancelled, or preempted for good
    UNKNOWN = auto()  # the controller does not answer


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """One job.

    Attributes:
        name: as ``scontrol`` takes it: ``12``, or ``12_3`` of an array.
        restarts: how often it was queued again before this process was started.
    """

    name: str
    restarts: int = 0

    def fate(self) -> Fate:
        """Returns what becomes of the job, as its controller says at this moment."""
        return fate_of(scontrol("show", "job", "-o", self.name)[1], self.restarts)

    def requeue(self) -> str | None:
        """Has the job end and wait in the queue again; returns why it cannot, in a clause, or None."""
        done, said = scontrol("requeue", self.name)
        return None if done else one_line(said.removeprefix("slurm_requeue error: "), 200) or "scontrol says nothing"


def current(environment: Mapping[str, str] | None = None) -> SlurmJob | None:
    """Returns the job that the environment tells of, by default this process's; None outside of Slurm."""
    found = os.environ if environment is None else environment
    job_id, array = found.get("SLURM_JOB_ID", ""), found.get("SLURM_ARRAY_JOB_ID", "")
    if not job_id.isdecimal():
        return None
    # The raw number of an array's last task is that of the array, which stands for all of its tasks.
    name = f"{array}_{found.get('SLURM_ARRAY_TASK_ID')}" if array else job_id
    restarts = found.get("SLURM_RESTART_COUNT", "0")
    return SlurmJob(name, int(restarts) if restarts.isdecimal() else 0)


def scontrol(*words: str) -> tuple[bool, str]:
    """Runs ``scontrol``; returns whether it could do it, and what it printed."""
    said = ""
    for _ in range(TRIES):
        try:
            done = subprocess.run(
                ["scontrol", *words], capture_output=True, text=True, errors="replace", timeout=ASK_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return False, str(error)
        said = (done.stdout or done.stderr).strip()
        if done.returncode >= 0:
            return done.returncode == 0, said
    return False, said


def fate_of(shown: str, restarts: int) -> Fate:
    """Returns what becomes of a job.

    Args:
        shown: what ``scontrol show job -o`` prints of it.
        restarts: as this process knows them.
    """
    facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", shown))
    if "JobState" not in facts:
        return Fate.UNKNOWN
    if int(facts.get("Restarts", 0)) > restarts:
        return Fate.AGAIN
    if facts["JobState"] in ("RUNNING", "SUSPENDED"):
        return Fate.RUNNING
    if facts.get("Reason") == "TimeLimit" or facts["JobState"] == "TIMEOUT":
        return Fate.TIME_LIMIT
    return Fate.ENDED


def queue_again(job: SlurmJob, record: Mapping[str, Any]) -> str | None:
    """Has the job of a run that was paused start again, unless Slurm does so by itself; returns why not, or None.

    Args:
        record: the run's, closed.
    """
    segments = record.get("segments") or [{}]
    if len(segments) > 1 and not segments[-1].get("completed"):
        return "no request was finished since its last start; give it more time"  # or it would go round for ever
    why = None if job.fate() is Fate.AGAIN else job.requeue()
    return None if why is None or job.fate() is Fate.AGAIN else why


def remember(results_dir: str | Path, run_id: str) -> None:
    """Notes which run this process's Slurm job has begun, for its next start and for the sweep that submitted it.

    Raises:
        UserError: the note cannot be written.
    """
    if (job := current()) is not None:
        place = Path(results_dir) / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        files.replace(place / f"{job.name}.run", f"{run_id}\n".encode())


def begun_run(results_dir: str | Path, job: SlurmJob) -> str | None:
    """Returns the run that a job has begun; None where it has not come so far."""
    try:
        return (Path(results_dir) / FOLDER / f"{job.name}.run").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
