"""The jobs of a sweep as Slurm's: submitted all at once, followed by the sweep's process, cancelled by its Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.basics.errors import INTERRUPTED, REFUSED, UserError, one_line, quoted
from harness.basics.outcome import RUNNING, Fault
from harness.basics.places import ROOT
from harness.config.compose import search_path, to_config
from harness.config.identity import config_hash
from harness.machine import snapshot
from harness.machine.slurm import FOLDER, SlurmJob, begun_run
from harness.results.closing import close_unfinished
from harness.results.directory import read_record
from harness.running import job as prepared
from harness.running.launcher import LaunchOutcome
from harness.running.slurm import task
from harness.running.slurm.settings import SlurmSettings, sbatch_options
from harness.running.sweep_table import Follower, SweepJob, SweepRun, last_line
from harness.workload import reading

if TYPE_CHECKING:
    from harness.running.sweep import Sweep

# Of the sweep alone; a job is one run.
ONE_RUN = (
    *("repeat=1", "repeat_until=null"),
    *("sweep.resume=false", "sweep.confirm=0", "sweep.save_as=null"),
)
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
THERE = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
ENDS = {
    "TIMEOUT": ("timeout", "at its time limit; raise hydra.launcher.time"),
    "OUT_OF_MEMORY": ("oom", "for it was out of memory; raise hydra.launcher.mem"),
    "CANCELLED": ("interrupted", "for it was cancelled"),
    "NODE_FAIL": ("failed", "for its node failed"),
}
APPEARS_S = 10.0  # for a file that another host has written to be seen here
CANCELLED_S = 60.0  # for a job that is cancelled to close its run


class SlurmJobs:
    """Where a sweep's jobs run when they are Slurm's.

    Args:
        settings: what each of them asks for.
        sweep: whose jobs they are.
    """

    def __init__(self, settings: SlurmSettings, sweep: Sweep) -> None:
        self.settings = settings
        self.sweep = sweep
        self._waiting: dict[tuple[str, ...], deque[str]] = {}  # by the job's overrides: submitted, not yet asked after
        self._states: dict[str, str] = {}  # of all that were submitted and are not known to have ended

    def submit(self, jobs: Sequence[SweepJob]) -> None:
        """Submits all runs of ``jobs`` that are sure to be needed, as one array; takes up what a sweep before has left.

        Raises:
            UserError: Slurm does not take them.
        """
        wanted: list[tuple[SweepJob, int | None]] = []
        for job in jobs:
            assert job.composed is not None
            slots = self._slots(job.composed)
            missing = (1 if job.until is not None else job.times) - len(job.before)
            left = self._left(job.composed) if job.composed.sweep.resume else []
            self._waiting.setdefault(tuple(job.overrides), deque()).extend(left[: max(missing, 0)])
            wanted += [(job, slots)] * (missing - len(left))
        if wanted:
            self._submit(wanted)

    def launch(
        self, composed: DictConfig, overrides: list[str], follower: Follower, facts: dict[str, Any] | None = None
    ) -> LaunchOutcome:
        """Waits for the next run of a job, which is submitted now if it was not before; returns how it ended.

        Args: as of :func:`harness.running.launcher.launch`; nobody notes ``facts``, for jobs are no one's neighbours.
        """
        waiting = self._waiting.setdefault(tuple(overrides), deque())
        if not waiting:
            self._submit([(SweepJob(0, overrides, [], composed=composed), self._slots(composed))])
        name = waiting.popleft()
        log = Path(self.sweep.results_dir) / FOLDER / name / f"{name}_0_log.out"
        try:
            while self._state(name) in WAITING | THERE:
                follower(log, self._overview())
                time.sleep(self.settings.poll_s)
        except KeyboardInterrupt:
            self._cancel(name)
            return replace(self._outcome(name, log), exit_status=INTERRUPTED)
        return self._outcome(name, log)

    def ran_before(self, composed: DictConfig) -> list[SweepRun]:
        """Returns the runs of this very job that are done: same config, dataset, kind of nodes and code."""
        from harness.running.sweep import run_of

        found = []
        for name in self._noted(composed):
            record = _record_of(str(composed.results_dir), name)
            if record is not None and record.get("status") == "ok":
                found.append(replace(run_of(record), earlier=True))
        return found

    def _slots(self, composed: DictConfig) -> int | None:
        """Returns how many ranks each node gets; None where a run on one node starts its own."""
        gpus, nodes = self.settings.gpus_per_node or 0, self.settings.nodes
        tp, dp = composed.parallel.tp, composed.parallel.dp
        if nodes == 1 and (gpus < 2 or tp or dp):
            return None
        ranks = tp * dp if tp and dp else nodes * max(gpus, 1)
        if ranks % nodes:
            found = f"tp={tp} x dp={dp} are {ranks} ranks, which {nodes} nodes cannot share evenly"
            raise UserError("parallel", found, "change them or hydra.launcher.nodes")
        return int(ranks // nodes)

    def _submit(self, wanted: Sequence[tuple[SweepJob, int | None]]) -> None:
        import submitit

        folder = (Path(self.sweep.results_dir) / FOLDER).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.SlurmExecutor(folder / "%j")
        options = sbatch_options(self.settings)
        # The job unpickles a function of this package, wherever it was started.
        options["setup"] = [
            *options["setup"],
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
        executor.update_parameters(**options)
        more = [*ONE_RUN, f"requeue={str(self.settings.requeue).lower()}", *search_path()]
        try:
            # What sbatch says stands in the exception too.
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                submitted = [executor.submit(task.run, [*job.overrides, *more], slots) for job, slots in wanted]
        except (submitit.core.utils.FailedJobError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
            said = one_line(lines[0].partition("error:")[2] or lines[0], 200)
            raise UserError(
                "hydra.launcher", f"sbatch: {said}", "change hydra.launcher.* to what the cluster has"
            ) from error
        for (job, _), one in zip(wanted, submitted, strict=True):
            assert job.composed is not None
            self._waiting.setdefault(tuple(job.overrides), deque()).append(one.job_id)
            self._states[one.job_id] = "PENDING"
            with open(self._note_of(job.composed), "a", encoding="utf-8") as note:
                note.write(f"{one.job_id}\n")
        numbers = ", ".join(dict.fromkeys(one.job_id.partition("_")[0] for one in submitted))
        self.sweep.say(f"submitted {len(submitted)} run{'s' * (len(submitted) > 1)} to Slurm: job {numbers}")

    def _note_of(self, composed: DictConfig) -> Path:
        """Returns the file of the Slurm jobs that were submitted for this very job."""
        config = to_config(composed)
        facts = [
            config_hash(prepared.resolved(composed)),
            reading.read(config.dataset).sha256,
            snapshot.code_fingerprint(),
            [self.settings.nodes, bool(self.settings.gpus_per_node)],
        ]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        return Path(self.sweep.results_dir) / FOLDER / f"{name}.jobs"

    def _noted(self, composed: DictConfig) -> list[str]:
        try:
            return self._note_of(composed).read_text(encoding="utf-8").split()
        except (OSError, UserError):
            return []

    def _left(self, composed: DictConfig) -> list[str]:
        """Returns the Slurm jobs for this very job that an earlier process of the sweep has left to wait or run."""
        names = self._noted(composed)
        states = _look(names) or {}
        left = [name for name in names if states.get(name, "") in WAITING | THERE and name not in self._states]
        self._states |= {name: states[name] for name in left}
        return left

    def _state(self, name: str) -> str:
        """Returns the state of a job, and looks after those of the others; one that Slurm has forgotten has ended."""
        states = _look([*self._states, name])
        if states is not None:  # else the controller does not answer: they are what they were
            self._states = {other: states.get(other, "") for other in self._states}
            return states.get(name, "")
        return self._states.get(name, "PENDING")

    def _overview(self) -> str:
        counts = {"running": THERE, "waiting": WAITING}
        found = {word: sum(state in kinds for state in self._states.values()) for word, kinds in counts.items()}
        return ", ".join(f"{count} {word}" for word, count in found.items() if count)

    def _cancel(self, name: str) -> None:
        """Cancels all jobs that have not ended, and waits for one of them to close its run."""
        states = _look(list(self._states)) or self._states
        left = [other for other in self._states if states.get(other, "") in WAITING | THERE]
        if left:
            subprocess.run(["scancel", *left], capture_output=True, timeout=60, check=False)
            self.sweep.say(f"cancelled {len(left)} Slurm job{'s' * (len(left) > 1)}")
        deadline = time.monotonic() + CANCELLED_S
        while self._state(name) in WAITING | THERE and time.monotonic() < deadline:
            time.sleep(min(self.settings.poll_s, 1.0))

    def _outcome(self, name: str, log: Path) -> LaunchOutcome:
        """Returns how a job has ended, and closes its run if nobody could."""
        state, results_dir = self._states.pop(name, "") or "ended", self.sweep.results_dir
        status, why = ENDS.get(state, ("failed", f"({state})"))
        fault = Fault(status, f"Slurm ended job {name} {why}", 1)
        record: dict[str, Any] | None = None
        for _ in _times(APPEARS_S if state == "COMPLETED" else 1.0):
            record = _record_of(results_dir, name)
            if record is not None and record["status"] != RUNNING:
                break
        if record is None:
            told = last_line(log)
            said = quoted(told, 200) if told else log
            error = fault.error if state in ENDS else f"Slurm job {name} ended before its run began: {said}"
            return LaunchOutcome(1, {"run_id": "", "status": fault.status, "error": error})
        if record["status"] == RUNNING:
            close_unfinished(results_dir, record["run_id"], fault.status, fault.error)
            record = read_record(results_dir, record["run_id"]) or record
        return LaunchOutcome({"ok": 0, "invalid": REFUSED, "oom": REFUSED}.get(record["status"], 1), record)


def _record_of(results_dir: str, name: str) -> dict[str, Any] | None:
    """Returns the record of the run that a job has begun; None where it has not come so far."""
    run_id = begun_run(results_dir, SlurmJob(name))
    return read_record(results_dir, run_id) if run_id is not None else None


def _look(names: Sequence[str]) -> dict[str, str] | None:
    """Returns the states of those jobs that Slurm knows of; None where it does not answer."""
    if not names:
        return {}
    line = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={','.join(names)}"]
    environment = {word: value for word, value in os.environ.items() if not word.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    return dict(re.findall(r"^\s*(\S+)\|(\S+)\s*$", done.stdout, re.M))


def _times(within_s: float) -> Iterator[None]:
    """Yields now, and then again and again for so long."""
    deadline = time.monotonic() + within_s
    yield
    while time.monotonic() < deadline:
        time.sleep(0.5)
        yield
