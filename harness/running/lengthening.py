"""Runs of a search that take less than a few seconds tell little: they get more requests, where there are more."""

from __future__ import annotations

import math
from collections.abc import Callable

from omegaconf import DictConfig

from harness.config import compose
from harness.engines import catalogue as engines
from harness.running.sweep import Sweep
from harness.workload import reading

TRIES = 4
SPARE = 1.2  # more requests are done faster each


def longer(
    full_error: str | None,
    words: list[str],
    compose_words: Callable[[list[str]], DictConfig],
    say: Callable[[str], None],
) -> list[str]:
    """Returns the overrides with which a trial takes ``sweep.least_s``, found by running the defaults.

    Args:
        full_error: as of :class:`~harness.running.sweep.Sweep`.
        words: the overrides that all trials have.
        compose_words: returns the config of a command line.
        say: prints a line.

    Raises:
        KeyboardInterrupt: the user ended a run.
        UserError: the results cannot be written, or the dataset not read.
    """
    composed = compose_words(words)
    least_s = composed.sweep.least_s
    if not least_s or engines.find(str(composed.engine.name)).simulates:
        return []
    say("how long the defaults take:")
    requests = composed.dataset.num_samples
    there = reading.there(compose.to_config(composed).dataset) or 2**31
    requests = min(requests or there, there)
    for _ in range(TRIES):
        tried = [*words, f"dataset.num_samples={requests}", "repeat=1", "repeat_until=null", "sweep.least_s=0"]
        probe = Sweep(full_error)
        job = probe.add(tried, compose_words(tried), [f"dataset.num_samples={requests}"])
        probe.run([job])
        if not job.ok or not job.runs[0].elapsed_s:
            return []  # the trials may be other than the defaults
        elapsed_s = job.runs[0].elapsed_s
        if elapsed_s >= least_s or requests >= there:
            break
        requests = min(there, math.ceil(requests * SPARE * least_s / elapsed_s))
    if requests == composed.dataset.num_samples:
        return []
    say(f"less than sweep.least_s={least_s:g} s: each trial gets dataset.num_samples={requests}")
    return [f"dataset.num_samples={requests}"]
