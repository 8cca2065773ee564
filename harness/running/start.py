"""``python harness/main.py`` for one job: this process becomes its rank where it has one, else it starts the ranks."""

from __future__ import annotations

import io
import os
import signal
import sys

from omegaconf import DictConfig

from harness.basics.errors import INTERRUPTED, UserError, complain, report
from harness.ranks.rank import PARENT_VARIABLE, RUN_ID_VARIABLE, Rank
from harness.results.recorder import RunRecorder
from harness.running import launcher, worker
from harness.running.job import Job
from harness.running.launcher import LaunchOutcome


def run(composed: DictConfig, overrides: list[str]) -> int:
    """Runs one job on the user's terminal; returns the exit status."""
    try:
        begun = launcher.begin(composed)
        if isinstance(begun, LaunchOutcome):
            return launcher.report_outcome(begun)
        recorder, job = begun
        if job.processes > 1:
            return launcher.report_outcome(launcher.launched(recorder, job, overrides))
    except UserError as error:
        return report(error)
    try:
        return _become_the_rank(composed, overrides, recorder, job)
    except KeyboardInterrupt:  # before the rank could heed it
        recorder.finish("interrupted", "interrupted")
        complain("interrupted")
        return INTERRUPTED
    finally:
        recorder.release()


def _become_the_rank(composed: DictConfig, overrides: list[str], recorder: RunRecorder, job: Job) -> int:
    """Runs the only rank of a job in this process; returns the exit status."""
    variables = launcher.variables(1, job.runs_on)
    if job.runs_on == "cuda":
        # The CUDA driver has been asked for its devices by now, and shows this program those for good.
        line = launcher.command(1, job.accelerator, [*overrides, *launcher.split_words(job)])
        parent = {RUN_ID_VARIABLE: recorder.run_id, PARENT_VARIABLE: str(os.getpid())}
        os.execve(line[0], line, variables | parent)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, lambda signum, frame: os.kill(os.getpid(), signal.SIGINT))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(write_through=True)  # a rank's lines are seen at once, in a file too
    recorder.write_alone()
    return worker.run(composed, Rank(), (recorder, job))
