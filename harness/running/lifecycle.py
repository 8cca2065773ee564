"""One rank's life: met, told, ended."""

from __future__ import annotations

import signal
from typing import Any

from harness.basics.outcome import Fault
from harness.config.identity import PLACES, UNHASHED_KEYS
from harness.ranks.rendezvous import Rendezvous
from harness.running.job import Job

LAST_WORDS_S = 1.0  # for a rank that ends to say why, after its connections have broken


def _tell(rendezvous: Rendezvous, fault: Fault) -> None:
    """Tells the other ranks; meanwhile a signal ends this one, since there is nothing left to write down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    rendezvous.fail(fault.error, fault.exit_status, fault.status)
    for number in (signal.SIGINT, signal.SIGTERM):
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
