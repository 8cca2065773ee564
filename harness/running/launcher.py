"""Builds and watches the ranks' command, ``deepspeed``'s where there are several, and says how it ended."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.basics.errors import INTERRUPTED, PAUSED, REFUSED, UserError, complain, report
from harness.basics.outcome import Fault
from harness.basics.places import LAUNCHED
from harness.config.compose import search_path
from harness.machine import device, memory, slurm
from harness.ranks.rank import PARENT_VARIABLE, RANK_VARIABLES, RUN_ID_VARIABLE, free_port
from harness.results.closing import close_unfinished
from harness.results.directory import LAUNCH_LOG, new_run_id, read_record
from harness.results.lock import LOCK
from harness.results.recorder import RunRecorder
from harness.running import faults, sampling
from harness.running import job as jobs
from harness.running.sizes import SETTLED
from harness.running.watch import MAIN, Watched, watch

# How CUDA_VISIBLE_DEVICES names a GPU: by its number, or by the UUID of a whole one or of a MIG slice.
GPU_NAME = re.compile(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+")


@dataclass(frozen=True, slots=True)
class LaunchOutcome:
    """How a launch ended.

    Attributes:
        record: the run's ``record.json``, whose ``status`` is final.
        error: what the user has not seen yet, if there is something.
    """

    exit_status: int
    record: dict[str, Any]
    error: UserError | str | None = None


def report_outcome(outcome: LaunchOutcome) -> int:
    """Tells the user how a launch ended, and returns its exit status."""
    if isinstance(outcome.error, UserError):
        report(outcome.error)
    elif outcome.error is not None:
        complain(str(outcome.error))
    return outcome.exit_status


def launch(
    composed: DictConfig,
    overrides: list[str],
    watcher: Callable[[Path], None] | None = None,
    facts: dict[str, Any] | None = None,
) -> LaunchOutcome:
    """Runs one job in processes of its own: one rank as it is, several in a ``deepspeed`` launch.

    Args:
        composed: the config, for the checks and the number of ranks.
        overrides: the command line that composed it; the ranks compose the same.
        watcher: called several times a second with the file (:data:`LAUNCH_LOG`, in the run's directory) that
            then gets what the launch prints. None leaves it on the terminal.
        facts: what else its record is to say.

    Raises:
        UserError: the results cannot be written; anything else that is wrong is an outcome, and a row.
    """
    begun = begin(composed, facts)
    return begun if isinstance(begun, LaunchOutcome) else launched(*begun, overrides, watcher)


def begin(composed: DictConfig, facts: dict[str, Any] | None = None) -> tuple[RunRecorder, jobs.Job] | LaunchOutcome:
    """Checks a job and begins its record, so that nobody else takes the run over; or says why it cannot run.

    Raises:
        UserError: the results cannot be written, or the run that is to be resumed cannot be.
    """
    resolved = jobs.resolved(composed)
    if composed.resume is not None:
        recorder, job = _taken_up(composed, resolved)
    else:
        run_id = new_run_id(str(resolved["engine"].get("name")))
        recorder = RunRecorder.create(str(resolved["results_dir"]), run_id, resolved, sys.argv, claim=True)
        slurm.remember(recorder.results_dir, run_id)
        try:
            job = _checked(composed)
        except UserError as error:
            recorder.finish("invalid", str(error))
            return LaunchOutcome(REFUSED, recorder.record, error)
        except KeyboardInterrupt:
            recorder.finish("interrupted", "interrupted")
            return LaunchOutcome(INTERRUPTED, recorder.record, "interrupted")
        except BaseException as error:
            recorder.finish("failed", f"{type(error).__name__}: {error}")
            raise
        recorder.settle(job.settings, launcher=myself(), **job.choices, **(facts or {}))
    return recorder, job


def launched(
    recorder: RunRecorder, job: jobs.Job, overrides: list[str], watcher: Callable[[Path], None] | None = None
) -> LaunchOutcome:
    """Starts the ranks of a run that has been begun, waits for them, and returns how they ended."""
    try:
        return _launched(recorder, job, overrides, watcher)
    finally:
        recorder.release()


def _launched(
    recorder: RunRecorder, job: jobs.Job, overrides: list[str], watcher: Callable[[Path], None] | None
) -> LaunchOutcome:
    config, run_id = job.config, recorder.run_id
    ranks, accelerator = job.processes, job.runs_on
    log = recorder.directory / LAUNCH_LOG
    with nullcontext() if watcher is None else open(log, "wb") as output:
        ending = watch(
            command(ranks, accelerator, [*overrides, *split_words(job)]),
            variables(ranks, accelerator) | {RUN_ID_VARIABLE: run_id, PARENT_VARIABLE: str(os.getpid())},
            config.timeout_s,
            output,
            None if watcher is None else lambda: watcher(log),
            recorder.directory,
        )
    unreported: UserError | str | None
    try:
        unreported = _close(ending, config.results_dir, run_id)
    except UserError as error:
        unreported = None if ending.returncode == REFUSED else error  # rank 0 has met the same full disk, and said so
    record = read_record(config.results_dir, run_id)
    if record is None:  # for a sweep, which has no other word of it
        gone = recorder.gone()
        record = {
            "run_id": run_id,
            "status": "failed",
            "error": "its record.json is gone" if gone is None else str(gone),
        }
    status = record.get("status")
    if status == "ok":
        exit_status = INTERRUPTED if ending.interrupted else 0 if ending.returncode == 0 else 1
        if exit_status == 1 and unreported is None:
            unreported = f"the run was complete when a rank ended with status {ending.returncode}"
    elif status == "interrupted":
        exit_status = PAUSED if ending.returncode == PAUSED else INTERRUPTED
    else:
        exit_status = REFUSED if ending.returncode == REFUSED or status == "oom" else 1
    return LaunchOutcome(exit_status, record, unreported)


def _checked(composed: DictConfig) -> jobs.Job:
    job = jobs.prepare(composed)
    check_devices(job.tp, job.dp, job.runs_on)
    sampling.check_power(job, None)
    return job


def _taken_up(composed: DictConfig, resolved: dict[str, Any]) -> tuple[RunRecorder, jobs.Job]:
    """Begins a new segment of the run that is to be resumed; one that is refused stays as it was.

    Until the ranks have ended it is ours, so that nobody else begins one before rank 0 is there.
    """
    job = _checked(composed)
    recorder = RunRecorder.resume(str(resolved["results_dir"]), str(composed.resume), job.settings, sys.argv)
    try:
        recorder.check_work(**job.work)
        recorder.note(launcher=myself(), **job.choices)
    except BaseException:
        recorder.release()
        raise
    slurm.remember(recorder.results_dir, recorder.run_id)
    recorder.release(LOCK)  # rank 0 is the one to write
    return recorder, job


def split_words(job: jobs.Job) -> list[str]:
    """Returns the overrides that tell the ranks what was chosen for them, and where further options are."""
    chosen = [f"parallel.tp={job.tp}", f"parallel.dp={job.dp}"]
    sizes = {key: getattr(job.config.engine, key, None) for key in SETTLED}
    chosen += [f"engine.{key}={size}" for key, size in sizes.items() if isinstance(size, int | float)]
    return [*chosen, *search_path()]


def myself(pid: int | None = None) -> list[Any]:
    """Returns what the record calls this process, or another of this host: who may have rank 0 write it."""
    return [socket.gethostname(), os.getpid() if pid is None else pid]


def run_program(program: Path, ranks: int, accelerator: str, words: list[str], timeout_s: float | None) -> int:
    """Runs the ranks of another of :data:`PROGRAMS`, which keep no record; returns the exit status."""
    ending = watch(
        command(ranks, accelerator, words, program),
        variables(ranks, accelerator) | {PARENT_VARIABLE: str(os.getpid())},
        timeout_s,
    )
    if ending.interrupted:
        return INTERRUPTED
    if ending.returncode not in (0, 1, REFUSED, INTERRUPTED) and not ending.timed_out:
        complain(describe(ending.returncode, ending.kills, {}).error)
    return ending.returncode if ending.returncode in (0, REFUSED) else 1


def check_devices(tp: int, dp: int, accelerator: str) -> None:
    """Raises UserError where the config asks for more ranks than this machine has GPUs; a CPU takes any number."""
    if accelerator != "cuda" or tp * dp <= (found := device.cuda_devices()):
        return
    raise UserError(
        "parallel",
        f"tp={tp} x dp={dp} needs {tp * dp} GPUs, this machine shows {found}",
        f"ask for fewer, or launch on several machines: deepspeed --hostfile FILE {LAUNCHED} ... (launch/NODES.md)",
    )


def command(ranks: int, accelerator: str, overrides: list[str], program: Path = MAIN) -> list[str]:
    """Returns the command that starts ``ranks`` ranks of this harness on this machine.

    A lone rank is started as it is, several by DeepSpeed's launcher for one host. All else that DeepSpeed would do for
    them is in :func:`variables`.
    """
    if ranks == 1:
        return [sys.executable, "-u", str(program), *overrides]
    chosen = visible_devices(ranks, accelerator) or map(str, range(ranks))
    devices = [int(name) if name.isdecimal() else name for name in chosen]  # the launcher joins them as they are
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    # What DeepSpeed's runner would start on one host, without the seconds that its own imports take.
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        *(f"--world_info={hosts}", "--master_addr=127.0.0.1"),
        f"--master_port={free_port()}",  # the default one collides between jobs
        "--log_level=critical",  # its lines would tear the progress display
        str(program),
        *overrides,
    ]


def visible_devices(ranks: int, accelerator: str) -> list[str] | None:
    """Returns the GPUs that the user chose, one a rank, as :data:`GPU_NAME`; None where there is no such choice.

    CUDA takes the list up to the first word that names none.
    """
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    visible = list(takewhile(GPU_NAME.fullmatch, words))
    return visible[:ranks] if accelerator == "cuda" and len(visible) >= ranks else None


def variables(ranks: int, accelerator: str) -> dict[str, str]:
    """Returns the environment for :func:`command`: this process's without what another launcher set in it.

    Nor with the GPUs that the user chose, of which each rank gets its own. A lone rank gets what DeepSpeed's launcher
    would set.
    """
    left_out = {"CUDA_VISIBLE_DEVICES", RUN_ID_VARIABLE, PARENT_VARIABLE, *RANK_VARIABLES}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"DS_ACCELERATOR": accelerator} | (_alone(accelerator) if ranks == 1 else {})


def _alone(accelerator: str) -> dict[str, str]:
    """Returns what DeepSpeed's launcher sets for the only rank of a launch."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "CROSS_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"), "1"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": (visible_devices(1, accelerator) or ["0"])[0],
    }


def _close(ending: Watched, results_dir: str, run_id: str) -> str | None:
    """Closes the record if rank 0 could not; returns why, for the user, who has not seen it."""
    if ending.timed_out and ending.timeout_s is not None:
        fault = faults.timed_out(ending.timeout_s)
    elif ending.interrupted:
        fault = Fault("interrupted", "interrupted before the ranks could begin", INTERRUPTED)
    elif ending.returncode == 0:
        fault = Fault("failed", "the launch ended without a result", 1)
    else:
        fault = describe(ending.returncode, ending.kills, read_record(results_dir, run_id) or {})
    if close_unfinished(results_dir, run_id, fault.status, fault.error, launcher=myself()) is None:
        return None
    return f"{fault.error} ({faults.way_on(f'{results_dir}/{run_id}', run_id)})"


def describe(returncode: int, kills: memory.OomKills, record: dict[str, Any]) -> Fault:
    """Returns what a launch's exit status says: the launcher passes on a signal N as ``-N`` or ``256 - N``.

    Args:
        kills: made before the launch.
        record: the run's, as far as it got.
    """
    number = -returncode if returncode < 0 else 256 - returncode
    if 0 < number < 65:
        return faults.killed("a rank", number, kills, record.get("config") or {}, record)
    if record.get("launcher") and record.get("pid") != record["launcher"][1]:  # rank 0 had begun to write it
        error = f"rank 0 died before it could close its record; a rank ended with status {returncode}"
        return Fault("failed", error, 1)
    return Fault("failed", f"a rank ended with status {returncode} before it could write its record", 1)
