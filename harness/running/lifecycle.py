"""One rank's life, whatever it is started for: open, meet the others, work, and tell them how it ended."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from harness.basics.errors import INTERRUPTED, PAUSED, REFUSED, UserError, show_traceback
from harness.basics.outcome import Fault
from harness.config.identity import PLACES, UNHASHED_KEYS
from harness.machine import memory, slurm
from harness.ranks import signals
from harness.ranks.rank import Rank, check_world
from harness.ranks.rendezvous import RankFailed, Rendezvous
from harness.running import faults
from harness.running import job as jobs
from harness.running.job import Job

LAST_WORDS_S = 1.0  # for a rank that ends to say why, after its connections have broken
ORPHANED = "the launching process was killed, or ended before its ranks"
CTRL_C = "interrupted"


class RankWork(ABC):
    """What a rank is started for: a run, or an evaluation.

    Attributes:
        config: resolved, as plain data.
        running: whether the engine is ready; what is refused from then on is a run that failed.
    """

    config: dict[str, Any]
    running = False

    @property
    def facts(self) -> Mapping[str, Any]:
        """How far the work got, for :func:`~harness.running.faults.advice`."""
        return {"phase": "load"}

    def begin(self) -> None:
        """Called once signals are handled."""
        return

    @abstractmethod
    def check(self, composed: DictConfig) -> Job:
        """Returns the job; raises UserError for what can be refused before a model is loaded."""

    @abstractmethod
    def run(self, job: Job, rendezvous: Rendezvous) -> int:
        """Does this rank's part once all ranks are there; returns the exit status."""

    def stop(self) -> None:
        """Ends what is still going on between the ranks."""
        return

    @abstractmethod
    def keep_traceback(self, error: Exception) -> str:
        """Keeps where an unforeseen error came from; returns where the user finds it, in a clause."""

    @abstractmethod
    def close(self, fault: Fault, heard: bool) -> Fault:
        """Writes down how the work ended and tells the user; returns what the other ranks are to be told.

        Args:
            heard: whether another rank has said why it could not go on.
        """

    def afterwards(self) -> None:
        """Called once the other ranks have been told, unless the run is only paused."""
        return

    def leave(self, fault: Fault) -> None:
        """Called last."""
        return


class Lifecycle:
    """Takes a rank through its work, and makes one :class:`Fault` of whatever ends it early.

    Args:
        alone: whether nobody has started this process as a rank: then no launcher's death ends it.
    """

    def __init__(self, rank: Rank, work: RankWork, alone: bool) -> None:
        self.rank = rank
        self.work = work
        self.alone = alone
        self.kills = memory.OomKills()
        # A thread cannot raise in the main thread; a signal can.
        self.rendezvous = Rendezvous(rank, failed=lambda: os.kill(os.getpid(), signal.SIGTERM))

    def run(self, composed: DictConfig) -> int:
        """Runs this rank's part of the job; returns the exit status."""
        try:
            with signals.handled(self.work.config.get("timeout_s"), self._hung):
                if not self.alone:
                    signals.end_with_the_parent()
                self.work.begin()
                self.rendezvous.open()
                return self.work.run(self._meet(composed), self.rendezvous)
        except (Exception, signals.Ended) as error:
            fault = self._fault(error)
        self.work.stop()
        fault = self.work.close(fault, self.rendezvous.failure is not None)
        self._tell(fault)
        if fault.exit_status != PAUSED:
            self.work.afterwards()
        self.work.leave(fault)
        return fault.exit_status

    def _meet(self, composed: DictConfig) -> Job:
        """Returns the job once all ranks are there and about to run it, split as rank 0 has split it.

        What fits is a question of free memory, which another rank may have found otherwise a moment later.
        """
        job = self.work.check(composed)
        if not job.simulated:  # else this process is all of them
            check_world(self.rank, job.tp, job.dp)
        tp, dp = self.rendezvous.meet(same_everywhere(job), (job.tp, job.dp))
        return job if (tp, dp) == (job.tp, job.dp) else self.work.check(jobs.with_split(composed, tp, dp))

    def _fault(self, error: Exception | signals.Ended) -> Fault:
        if isinstance(error, signals.Ended):
            return self._ended(error.signum)
        if isinstance(error, RankFailed):
            return self._elsewhere(error)
        if isinstance(error, UserError):
            show_traceback(error)
            if memory.out_of_memory(error):
                return faults.classify(error, self.work.config, self.work.facts)
            return Fault("failed" if self.work.running else "invalid", str(error), REFUSED)
        # A rank that ends breaks its connections: why it ended says more than that they broke.
        cause = self.rendezvous.heard(LAST_WORDS_S)
        if cause is not None:
            return self._elsewhere(cause)
        return faults.classify(error, self.work.config, self.work.facts, self.work.keep_traceback(error))

    def _ended(self, signum: int) -> Fault:
        """Returns why a signal has ended this rank."""
        if signum == signal.SIGALRM:
            return faults.timed_out(self.work.config["timeout_s"])
        if signum == signals.ORPHANED:
            return Fault("failed", ORPHANED, INTERRUPTED)
        here = slurm.current()
        if self.rank.world > 1 and signum == signal.SIGTERM:
            # So the launcher ends the others when a rank has died; a user's Ctrl-C comes as SIGINT.
            heard = self.rendezvous.heard(LAST_WORDS_S)
            if heard is not None or here is None:
                died, host = "another rank of this host", self.rank.host
                gone = RankFailed("another rank died, or the launcher was ended", died=died, host=host)
                return self._elsewhere(heard or gone)
        if signum == signals.PAUSE or (signum == signal.SIGTERM and here is not None):
            return self._paused(f"paused by {signal.Signals(signum).name}")
        return Fault("interrupted", CTRL_C, INTERRUPTED)

    def _paused(self, error: str) -> Fault:
        """Returns how a run ended that a job system has told to end; of a Slurm job rank 0 asks for the reason."""
        job = slurm.current() if self.rank.first else None
        fate = None if job is None else job.fate()
        if job is not None and fate is slurm.Fate.TIME_LIMIT:
            return Fault("timeout", f"not finished within the time limit of its Slurm job {job.name}; raise --time", 1)
        if job is not None and fate is slurm.Fate.ENDED:
            return Fault("interrupted", f"its Slurm job {job.name} was cancelled", INTERRUPTED)
        return Fault("interrupted", error, PAUSED)

    def _elsewhere(self, failure: RankFailed) -> Fault:
        """Returns how the run ended of which another rank could not go on."""
        if failure.exit_status == PAUSED:
            return self._paused(str(failure))
        if failure.status is not None:
            # The ranks of a host have one launcher, whose end or Ctrl-C each notices: whichever was the first.
            alike = not self.rank.several_hosts and failure.cause in (ORPHANED, CTRL_C)
            return Fault(failure.status, failure.cause if alike else str(failure), failure.exit_status)
        if failure.died is not None and failure.host == self.rank.host and self.kills:
            return faults.killed(failure.died, 0, self.kills, self.work.config, self.work.facts)
        refused = "failed" if self.work.running else "invalid"
        status = {REFUSED: refused, INTERRUPTED: "interrupted"}.get(failure.exit_status, "failed")
        return Fault(status, str(failure), failure.exit_status)

    def _hung(self, signum: int) -> None:
        """Ends this process, from another thread, where the main thread does not come back to notice a signal."""
        fault = self._ended(signum)
        try:
            fault = self.work.close(fault, self.rendezvous.failure is not None)
        finally:
            self.rendezvous.fail(fault.error, fault.exit_status, fault.status)
            self.work.leave(fault)
            os._exit(fault.exit_status)

    def _tell(self, fault: Fault) -> None:
        """Tells the other ranks; meanwhile a signal ends this one, since there is nothing left to write down."""
        if fault.exit_status != PAUSED:  # a job system may send several, and the job is still to be queued again
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
        self.rendezvous.fail(fault.error, fault.exit_status, fault.status)
        for number in (signal.SIGINT, signal.SIGTERM, signals.PAUSE):
            signal.signal(number, signal.SIG_IGN)


def same_everywhere(job: Job) -> dict[str, Any]:
    """Returns, by name, what all ranks of a launch must agree on: every host composes and reads on its own."""
    facts: dict[str, Any] = {}
    asked = {"tp": job.split.asked[0], "dp": job.split.asked[1]}
    for group, keys in (job.settings | {"parallel": asked}).items():
        if group not in UNHASHED_KEYS:
            facts |= {f"{group}.{key}": value for key, value in keys.items()} if isinstance(keys, dict) else {}
    for place in PLACES:
        del facts[place]
    facts["model.dtype"] = job.dtype
    facts["model's config.json"] = job.source.architecture
    facts["dataset's sha256"] = job.workload.sha256
    facts["DS_ACCELERATOR"] = job.accelerator
    return facts
