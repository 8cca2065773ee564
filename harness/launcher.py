"""Builds and watches one ``deepspeed`` command, and says how it ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
from omegaconf import DictConfig

from harness import environment, faults
from harness import job as jobs
from harness.errors import INTERRUPTED, REFUSED, UserError, complain, report
from harness.results import LAUNCH_LOG, RunRecorder, close_unfinished, new_run_id, read_record

MAIN = Path(__file__).resolve().parent / "main.py"
PROGRAMS = (MAIN, MAIN.with_name("accuracy.py"))  # whose processes are ranks
RUN_ID_VARIABLE = "HARNESS_RUN_ID"
PARENT_VARIABLE = "HARNESS_PARENT_PID"
GRACE_S = 30.0  # for ranks to write down what they have, after they were asked to end
DEAF_S = 5.0  # the same, for ranks that have not heeded their own alarm for as long already


# What a launcher tells its ranks; a launch that one of them starts must not hear it.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended.

    Attributes:
        record: the run's ``record.json``, whose ``status`` is final.
        error: what the user has not been told yet, if there is something.
    """

    exit_status: int
    record: dict[str, Any]
    error: UserError | str | None = None


def run(composed: DictConfig, overrides: list[str]) -> int:
    """Runs one job in a ``deepspeed`` launch of its own, on the user's terminal; returns the exit status."""
    try:
        outcome = launch(composed, overrides)
    except UserError as error:
        return report(error)
    if isinstance(outcome.error, UserError):
        report(outcome.error)
    elif outcome.error is not None:
        complain(str(outcome.error))
    return outcome.exit_status


def launch(composed: DictConfig, overrides: list[str], watcher: Callable[[Path], None] | None = None) -> Outcome:
    """Runs one job in a ``deepspeed`` launch of its own.

    Args:
        composed: the config, for the checks and the number of ranks.
        overrides: the command line that composed it; the ranks compose the same.
        watcher: called several times a second with the file (:data:`LAUNCH_LOG`, in the run's directory) that
            then gets what the launch prints. None leaves it on the terminal.

    Raises:
        UserError: the results cannot be written; anything else that is wrong is an outcome, and a row.
    """
    resolved = jobs.resolved(composed)
    if composed.resume is not None:
        run_id = str(composed.resume)
        recorder, job = _taken_up(composed, resolved)
    else:
        run_id = new_run_id(str(resolved["engine"].get("name")))
        recorder = RunRecorder.create(str(resolved["results_dir"]), run_id, resolved, sys.argv)
        try:
            job = _checked(composed)
        except UserError as error:
            recorder.finish("invalid", str(error))
            return Outcome(REFUSED, recorder.record, error)
        except KeyboardInterrupt:
            recorder.finish("interrupted", "interrupted")
            return Outcome(INTERRUPTED, recorder.record, "interrupted")
        except BaseException as error:
            recorder.finish("failed", f"{type(error).__name__}: {error}")
            raise
        recorder.note(launcher=_myself())
    config = job.config
    log = recorder.directory / LAUNCH_LOG
    with nullcontext() if watcher is None else open(log, "wb") as output:
        ending = _watch(
            command(config.parallel.tp * config.parallel.dp, job.accelerator, overrides),
            variables()
            | {RUN_ID_VARIABLE: run_id, PARENT_VARIABLE: str(os.getpid()), "DS_ACCELERATOR": job.accelerator},
            config.timeout_s,
            output,
            None if watcher is None else lambda: watcher(log),
        )
    untold: UserError | str | None
    try:
        untold = ending.close(config.results_dir, run_id)
    except UserError as error:
        untold = None if ending.returncode == REFUSED else error  # rank 0 has met the same full disk, and said so
    record = read_record(config.results_dir, run_id) or {}
    status = record.get("status")
    if status == "ok":
        exit_status = INTERRUPTED if ending.interrupted else 0 if ending.returncode == 0 else 1
        if exit_status == 1 and untold is None:
            untold = f"the run was complete when a rank ended with status {ending.returncode}"
    elif status == "interrupted":
        exit_status = INTERRUPTED
    else:
        exit_status = REFUSED if ending.returncode == REFUSED or status == "oom" else 1
    return Outcome(exit_status, record, untold)


def _checked(composed: DictConfig) -> jobs.Job:
    job = jobs.prepare(composed)
    check_devices(job.config.parallel.tp, job.config.parallel.dp, job.accelerator)
    return job


def _taken_up(composed: DictConfig, resolved: dict[str, Any]) -> tuple[RunRecorder, jobs.Job]:
    """Begins a new segment of the run that is to be gone on with; one that is refused stays as it was."""
    job = _checked(composed)
    recorder = RunRecorder.resume(str(resolved["results_dir"]), str(composed.resume), resolved, sys.argv)
    try:
        recorder.check_work(**job.work)
        recorder.note(launcher=_myself())
    finally:
        recorder.release()  # rank 0 is the one to have it
    return recorder, job


def _myself() -> list[Any]:
    return [socket.gethostname(), os.getpid()]


def run_program(program: Path, ranks: int, accelerator: str, words: list[str], timeout_s: float | None) -> int:
    """Runs another of :data:`PROGRAMS` in a ``deepspeed`` launch; returns its exit status. Its ranks keep no record."""
    ending = _watch(
        command(ranks, accelerator, words, program),
        variables() | {PARENT_VARIABLE: str(os.getpid()), "DS_ACCELERATOR": accelerator},
        timeout_s,
        None,
        None,
    )
    if ending.interrupted:
        return INTERRUPTED
    if ending.returncode not in (0, 1, REFUSED, INTERRUPTED) and not ending.timed_out:
        complain(describe(ending.returncode, ending.kills, {}).error)
    return ending.returncode if ending.returncode in (0, REFUSED) else 1


def check_devices(tp: int, dp: int, accelerator: str) -> None:
    """Raises UserError where the config asks for more ranks than this machine has GPUs; a CPU takes any number."""
    if accelerator != "cuda" or tp * dp <= (found := environment.cuda_devices()):
        return
    raise UserError(
        "parallel",
        f"tp={tp} x dp={dp} needs {tp * dp} GPUs, this machine shows {found}",
        "ask for fewer, or launch on several machines: deepspeed --hostfile FILE harness/main.py ... (launch/NODES.md)",
    )


def command(ranks: int, accelerator: str, overrides: list[str], program: Path = MAIN) -> list[str]:
    """Returns the ``deepspeed`` command that starts ``ranks`` ranks of this harness on this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    if accelerator == "cuda" and len(visible) >= ranks and all(number.isdecimal() for number in visible):
        # A number of GPUs would be counted from the machine's first, whichever the user chose.
        where = ["--include", f"localhost:{','.join(visible[:ranks])}"]
    else:
        where = ["--num_gpus" if accelerator == "cuda" else "--num_accelerators", str(ranks)]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *where,
        *("--hostfile", os.devnull),  # this machine alone, also where the default /job/hostfile exists
        *("--master_port", str(free_port())),  # the default one collides between jobs
        *("--log_level", "critical"),  # its lines would tear the progress display
        str(program),
        *overrides,
    ]


def variables() -> dict[str, str]:
    """Returns this process's environment without what another launcher told it.

    Nor with the GPUs that :func:`command` has named, since DeepSpeed would say so.
    """
    left_out = {"CUDA_VISIBLE_DEVICES", *RANK_VARIABLES}
    return {name: value for name, value in os.environ.items() if name not in left_out}


def free_port() -> int:
    """Returns a TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class _Ending:
    """How the launch ended, as far as its outside shows."""

    def __init__(
        self, returncode: int, timed_out: bool, interrupted: bool, timeout_s: float | None, kills: faults.OomKills
    ) -> None:
        self.returncode = returncode
        self.timed_out = timed_out
        self.interrupted = interrupted
        self.timeout_s = timeout_s
        self.kills = kills

    def close(self, results_dir: str, run_id: str) -> str | None:
        """Closes the record if rank 0 could not; returns why, for the user, who has not been told."""
        if self.timed_out and self.timeout_s is not None:
            fault = faults.timed_out(self.timeout_s)
        elif self.interrupted:
            fault = faults.Fault("interrupted", "interrupted before the ranks could begin", INTERRUPTED)
        elif self.returncode == 0:
            fault = faults.Fault("failed", "the launch ended without a result", 1)
        else:
            fault = describe(self.returncode, self.kills, read_record(results_dir, run_id) or {})
        if close_unfinished(results_dir, run_id, fault.status, fault.error, launcher=_myself()) is None:
            return None
        return f"{fault.error} ({faults.way_on(f'{results_dir}/{run_id}', run_id)})"


def describe(returncode: int, kills: faults.OomKills, record: dict[str, Any]) -> faults.Fault:
    """Returns what a launch's exit status says: the launcher passes on a signal N as ``-N`` or ``256 - N``.

    Args:
        kills: made before the launch.
        record: the run's, as far as it got.
    """
    number = -returncode if returncode < 0 else 256 - returncode
    if 0 < number < 65:
        return faults.killed("a rank", number, kills, record.get("config") or {}, record)
    return faults.Fault("failed", f"a rank ended with status {returncode} before it could write its record", 1)


def _watch(
    arguments: list[str],
    variables: dict[str, str],
    timeout_s: float | None,
    output: IO[bytes] | None,
    tick: Callable[[], None] | None,
) -> _Ending:
    """Runs the launch to its end, or ends it; its ranks get SIGINT first, so that they write their record."""
    stop_asked: list[int] = []
    kills = faults.OomKills()

    def ask(signum: int, frame: FrameType | None) -> None:
        stop_asked.append(signum)

    with _handling(ask):
        # A session of its own: Ctrl-C reaches the ranks through us alone, once.
        process = subprocess.Popen(
            arguments,
            env=variables,
            start_new_session=True,
            stdin=None if output is None else subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
        # The ranks keep the time themselves; we step in when one hangs outside Python.
        deadline = time.monotonic() + timeout_s + GRACE_S if timeout_s is not None else None
        timed_out = False
        while process.poll() is None and not timed_out and not stop_asked:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                timed_out = deadline is not None and time.monotonic() > deadline
                if tick is not None:
                    tick()
        if process.poll() is None:
            _end(process, DEAF_S if timed_out else GRACE_S)
        _end_strays(process.pid)
    return _Ending(process.returncode, timed_out, bool(stop_asked), timeout_s, kills)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Interrupts the ranks, gives them time, then kills whatever is left of the launch."""
    tree = _tree(process.pid)
    for member in tree:
        if _is_rank(member):
            _signal(member, signal.SIGINT)
    if not any(_is_rank(member) for member in tree):
        _signal(psutil.Process(process.pid), signal.SIGTERM)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    _, alive = psutil.wait_procs(_tree(process.pid) + tree, timeout=0.5)
    for member in alive:
        _signal(member, signal.SIGKILL)
    process.wait()


def _end_strays(session: int) -> None:
    """Ends ranks that have outlived their launch, since the next one would share the machine with them."""
    strays = [process for process in psutil.process_iter() if _session_of(process) == session and _is_rank(process)]
    for rank in strays:
        _signal(rank, signal.SIGINT)
    for rank in psutil.wait_procs(strays, GRACE_S)[1]:
        _signal(rank, signal.SIGKILL)


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_rank(process: psutil.Process) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    return any(str(program) in arguments for program in PROGRAMS) and "deepspeed.launcher.launch" not in arguments


def _signal(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        pass


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
