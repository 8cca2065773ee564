"""What the phases of one rank's run share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.basics.errors import printable
from harness.ranks.rank import Rank
from harness.ranks.rendezvous import Rendezvous
from harness.results.recorder import RunRecorder
from harness.running.job import Job
from harness.running.log import log

if TYPE_CHECKING:
    from harness.machine.telemetry import Sampler
    from harness.ranks.replicas import Replicas


class RunContext:
    """One rank's run: what was given, what has been found out on the way, and what must be ended with it.

    Attributes:
        recorder: rank 0's; None on the others.
        facts: how far the run got, for advice when memory runs out.
        notes: for the record and the summary.
        replicas: the ranks of the launch, once they have joined; None for a lone one.
        telemetry: the sampler of this rank's host; None on all of its ranks but one.
        device: torch's name of this rank's device, None until it is known.
        crowded: whether this host has fewer cores than ranks.
        peak_flops: of one rank, FLOP/s in the run's type; rank 0's, None where it is not known.
    """

    def __init__(self, job: Job, rank: Rank, recorder: RunRecorder | None, rendezvous: Rendezvous) -> None:
        from harness.basics.terminal import console  # imports rich, which no refusal needs

        self.job = job
        self.rank = rank
        self.recorder = recorder
        self.rendezvous = rendezvous
        self.screen = console()
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {"phase": "load", "dtype": job.dtype}
        self.replicas: Replicas | None = None
        self.telemetry: Sampler | None = None
        self.device: str | None = None
        self.crowded = False
        self.peak_flops: float | None = None

    def note(self, **figures: Any) -> None:
        """Notes figures in the record; rank 0's."""
        if self.recorder is not None:
            self.recorder.note(**figures)

    def say(self, line: str) -> None:
        """Logs a line and, on rank 0, prints it."""
        log.info(line)
        if self.rank.first:
            self.screen.print(printable(line), markup=False)
