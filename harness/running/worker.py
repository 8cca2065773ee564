"""One rank's run: load, warm up, deliver, sum up; and its record, however it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from harness.basics.errors import PAUSED, REFUSED, UserError, complain, printable, report
from harness.basics.outcome import Fault
from harness.engines import catalogue
from harness.machine import memory, openmp, slurm
from harness.ranks.rank import PARENT_VARIABLE, RUN_ID_VARIABLE, Rank, check_world
from harness.ranks.rendezvous import Rendezvous
from harness.results.directory import new_run_id
from harness.results.recorder import RunRecorder
from harness.running import again, faults, sampling, tracking, watchdog
from harness.running import job as jobs
from harness.running.context import RunContext
from harness.running.job import Job
from harness.running.launcher import myself
from harness.running.lifecycle import Lifecycle, RankWork
from harness.running.log import log, log_to

if TYPE_CHECKING:
    from harness.running.delivering import Delivery


def run(composed: DictConfig, rank: Rank, begun: tuple[RunRecorder, Job] | None = None) -> int:
    """Runs this rank's part of the job; returns the exit status.

    Rank 0 owns the run directory, the terminal and the row in ``runs.csv``; the others say what went
    wrong on standard error and leave.

    Args:
        begun: the record and the checked job, where this process has made them before it became the only rank.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings about lost peers would bury our own line
    openmp.wait_briefly()
    config = jobs.resolved(composed)
    recorder, checked = begun or (None, None)
    launched = rank
    if catalogue.of_record(config["engine"].get("name")).simulates:
        if not rank.first:
            return 0  # rank 0 plays all of them
        rank = Rank()
    told: Callable[[], None] | None = None
    if rank.first:
        try:
            recorder = recorder or _recorder(config)
        except UserError as error:
            return report(error)
        if begun is None and RUN_ID_VARIABLE not in os.environ:
            slurm.remember(recorder.results_dir, recorder.run_id)
        if os.environ.get(PARENT_VARIABLE) in (None, str(os.getpid())):
            told = watchdog.watch(recorder.results_dir, recorder.run_id, config.get("timeout_s"))
        log_to(f"{recorder.directory}/run.log")
    work = _RankRun(config, rank, recorder, checked, told, launched)
    return Lifecycle(rank, work, alone=begun is not None).run(composed)


def _recorder(config: dict[str, Any]) -> RunRecorder:
    """Returns what writes the run: a new one, the one that the launcher made, or the one to resume."""
    results_dir, launched = str(config["results_dir"]), os.environ.get(RUN_ID_VARIABLE)
    if launched is None and config["resume"] is not None:
        return RunRecorder.resume(results_dir, str(config["resume"]), config, sys.argv)
    run_id = launched or new_run_id(str(config["engine"].get("name")))
    parent = None if launched is None else myself(int(os.environ[PARENT_VARIABLE]))
    return RunRecorder.create(results_dir, run_id, config, sys.argv, hold=True, launcher=parent)


def _make_room(run: RunContext, delivery: Delivery) -> None:
    """Has the other ranks give back what their engines hold, before rank 0 looks for the memory of its check.

    Returns on every rank once all have; rank 0 tokenizes the chosen prompts with its engine first.
    """
    assert run.replicas is not None
    if not run.rank.first:
        device = delivery.loaded.engine.settings.device
        del delivery.loaded.engine
        memory.give_back(device)
    run.replicas.barrier()


class _RankRun(RankWork):
    """A rank's part of a run, and on rank 0 the run's record.

    Args:
        launched: what the launcher has made of this process, which plays all ranks of the launch if the run simulates.
    """

    def __init__(
        self,
        config: dict[str, Any],
        rank: Rank,
        recorder: RunRecorder | None,
        checked: Job | None,
        told: Callable[[], None] | None,
        launched: Rank,
    ) -> None:
        self.config = config
        self.rank = rank
        self.recorder = recorder
        self.checked = checked
        self.told = told
        self.launched = launched
        self.context: RunContext | None = None
        self.delivery: Delivery | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """How far loading got, and the dtype once it is known."""
        return super().facts if self.context is None else self.context.facts

    def begin(self) -> None:
        """Watches for the loss of the run's files."""
        if self.recorder is not None:
            self.recorder.watch_files(lost=lambda: os.kill(os.getpid(), signal.SIGTERM))

    def check(self, composed: DictConfig) -> Job:
        """Returns the job, checked before or now."""
        if self.checked is not None:
            return self.checked
        job = jobs.prepare(composed, self.launched)
        if job.simulated and self.launched.world > 1:
            check_world(self.launched, job.tp, job.dp)
        sampling.check_power(job, self.rank)
        return job

    def run(self, job: Job, rendezvous: Rendezvous) -> int:
        """Loads, delivers and sums up."""
        from harness.running import delivering, figures, loading  # torch and rich, which no refusal needs

        self.config.update(job.settings)
        self.context = run = RunContext(job, self.rank, self.recorder, rendezvous)
        self.delivery = delivering.Delivery(run, loading.load(run))
        self.running = True
        self.delivery.deliver_all()
        if run.replicas is not None:
            if job.config.verify:
                _make_room(run, self.delivery)
            run.replicas.leave()
        return figures.conclude(run, self.delivery) if self.rank.first else 0

    def stop(self) -> None:
        """Waits for completions that other ranks have sent already."""
        if self.context is not None and self.context.replicas is not None:
            self.context.replicas.stop()

    def keep_traceback(self, error: Exception) -> str:
        """Writes it to the log."""
        log.error("the run failed", exc_info=error)
        return faults.IN_THE_LOG

    def close(self, fault: Fault, heard: bool) -> Fault:
        """Closes the record, on rank 0, and says on standard error how the run ended."""
        if self.recorder is None:
            complain(f"rank {self.rank.rank}: {fault.error}")
            return fault
        if (gone := self.recorder.gone()) is not None:
            fault = Fault("failed", str(gone), REFUSED)
        else:
            log.error("%s: %s", fault.status, fault.error)
        more = ""
        try:
            more = self._write_down(self.recorder, fault)
        finally:  # whatever it is that cannot be written
            complain(fault.error if gone is not None else f"{fault.error}{more}")
        if more and self._by_hand(fault):
            line = self.recorder.record.get("segments", [{}])[-1].get("command_line")
            line = line or self.recorder.record["command_line"]
            print(again.resume_run(line, self.recorder.run_id), file=sys.stderr, flush=True)
        return fault

    def _by_hand(self, fault: Fault) -> bool:
        """Whether it is the user who goes on with the run, by one command."""
        queued = fault.exit_status == PAUSED and bool(self.config.get("requeue"))
        return fault.status == "interrupted" and not self.rank.several_hosts and not queued

    def afterwards(self) -> None:
        """Tells of the closed run where the config says."""
        if self.recorder is None or self.context is None or not self.recorder.closed:
            return
        if (line := tracking.send(self.context.job.config.tracking, self.recorder)) is not None:
            self.context.say(line)

    def leave(self, fault: Fault) -> None:
        """Has the Slurm job of a run that was paused wait in the queue again, if the user has asked for that."""
        job = slurm.current()
        if self.recorder is None or job is None or fault.exit_status != PAUSED or not self.config.get("requeue"):
            return
        if (why := slurm.queue_again(job, self.recorder.record)) is None:
            print(printable(f"Slurm starts job {job.name} again, which resumes run {self.recorder.run_id}"), flush=True)
        else:
            complain(f"requeue: job {job.name} is not queued again: {why}")

    def _write_down(self, recorder: RunRecorder, fault: Fault) -> str:
        """Closes the record; returns what the user is told beside how the run ended."""
        kept = f" ({faults.way_on(recorder.directory, recorder.run_id)})" if self.running else ""
        try:
            row = recorder.finish(fault.status, fault.error, **self._measured())
        except UserError as error:
            if self.told is not None:
                self.told()
            return f"{kept}; its row cannot be written either" if kept else f"; nor can its row be written: {error}"
        return " (the run is complete)" if row["status"] == "ok" else kept

    def _measured(self) -> dict[str, Any]:
        if self.context is None:
            return {}
        from harness.running import figures

        return figures.of_an_early_end(self.context, None if self.delivery is None else self.delivery.clock_s)
