"""The best of a search against the defaults: run in turn with them, and held to what the rounds show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from harness.basics.errors import UserError
from harness.basics.intervals import CONFIDENCE, LEAST, Interval, of_rounds
from harness.engines import catalogue as engines
from harness.running import job as jobs
from harness.running.sweep import Sweep
from harness.running.sweep_table import SweepJob


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rounds show.

    Attributes:
        winner: the best of the jobs that are faster than the defaults beyond doubt; None where none is.
        why: how much faster, or why none is named.
    """

    winner: SweepJob | None
    why: str


def confirm(sweep: Sweep, searched: Sequence[SweepJob], composed: DictConfig, requests: int) -> Sweep:
    """Runs the best jobs of a search in rounds with the defaults, which are the last of the jobs returned.

    Args:
        searched: the jobs that are ok, best first.
        requests: how many each run has.
    """
    assert sweep.compose is not None
    simulates = engines.find(str(composed.engine.name)).simulates
    rounds = 1 if simulates else composed.sweep.confirm_rounds  # nothing in a simulated run is random
    own = ("dataset.num_samples=", "repeat=", "repeat_until=")
    common = [word for word in searched[0].overrides if word not in searched[0].varied and not word.startswith(own)]
    common += [f"dataset.num_samples={requests}", f"repeat={rounds}", "repeat_until=null"]
    same_as = jobs.hash_of(sweep.compose(common))
    chosen: dict[str | None, list[str]] = {}
    for job in searched:
        if len(chosen) == composed.sweep.confirm:  # each look reads the dataset
            break
        found = jobs.hash_of(sweep.compose([*common, *job.varied]))
        if found != same_as:
            chosen.setdefault(found, job.varied)
    final = Sweep(sweep.full_error)
    final.elsewhere = sweep.elsewhere
    if composed.sweep.resume:
        # Of these very jobs an interrupted search has done a part; no other run counts, for those of the search are
        # the lucky ones.
        facts = json.dumps([rounds, same_as, *chosen])
        final.continue_series(f"confirm-{hashlib.sha256(facts.encode()).hexdigest()[:12]}")
    sweep.say(f"\nthe best of them, and the defaults, in {rounds} round{'s' * (rounds > 1)} on {requests} requests:")
    final.plan(jobs=len(chosen) + 1, fixed=sweep.fixed)
    for varied in [*chosen.values(), []]:
        line = [*common, *varied]
        final.add(line, sweep.compose(line), varied)
    final.run(final.jobs, lambda: drop_behind(final.jobs[:-1], final.jobs[-1]))
    final.show()
    return final


def drop_behind(finalists: Sequence[SweepJob], default: SweepJob) -> None:
    """Has jobs run no more that are shown to be behind the best of them; all, where that is behind the defaults."""
    running = [job for job in finalists if not job.dropped and job.rate]
    if not running:
        return
    best = max(running, key=lambda job: job.rate)
    for job in running:
        job.dropped = job is not best and _slower(job, best)
    if _slower(best, default):
        best.dropped = default.dropped = True


def _slower(job: SweepJob, than: SweepJob) -> bool:
    ratio = of_rounds(job.by_round, than.by_round)
    return ratio is not None and ratio.high < 1


def verdict(finalists: Sequence[SweepJob], default: SweepJob) -> Verdict:
    """Returns what rounds of ``finalists`` and of the defaults show.

    The more there are of them, the surer the interval of each has to be: one of several is soon the best by chance.

    Raises:
        UserError: neither the defaults nor any other was ok.
    """
    rated = [job for job in finalists if job.rate]
    if not default.rates and not rated:
        raise UserError("sweep.confirm", "no run of the best was ok", "their errors are above")
    if not finalists:
        return Verdict(None, "the best of the search are the defaults")
    if not rated:
        return Verdict(None, "no difference shown: only the defaults are ok")
    if not default.rates:
        return Verdict(max(rated, key=lambda job: job.rate), "where the defaults are not ok")
    if default.simulated:
        return _exact(max(rated, key=lambda job: job.rate), default)
    confidence = 1 - (1 - CONFIDENCE) / len(rated)
    found = [(of_rounds(job.by_round, default.by_round, confidence), job) for job in rated]
    ratios = [(ratio, job) for ratio, job in found if ratio is not None]
    if not ratios:
        few = f"fewer than {LEAST} rounds of them and the defaults were ok"
        return Verdict(None, f"no difference shown: {few}; sweep.confirm_rounds=8")
    clear = [pair for pair in ratios if pair[0].low > 1]
    ratio, best = max(clear or ratios, key=lambda pair: pair[0].middle)
    if clear:
        return Verdict(best, _ratio_text(ratio))
    no = "the defaults are faster" if ratio.high < 1 else "no difference shown"
    return Verdict(None, f"{no}: the best of the search, {' '.join(best.varied)}, is {_ratio_text(ratio)}")


def _exact(best: SweepJob, default: SweepJob) -> Verdict:
    """Returns the verdict on simulated runs, in which nothing is random."""
    factor = best.rate / default.rate
    text = f"{factor:.3f} times the defaults (simulated)"
    if factor > 1:
        return Verdict(best, text)
    no = "no difference" if factor == 1 else "the defaults are faster"
    return Verdict(None, f"{no}: the best of the search, {' '.join(best.varied)}, is {text}")


def _ratio_text(ratio: Interval) -> str:
    between = f"{ratio.low:.3f} to {ratio.high:.3f} with {CONFIDENCE:.0%} confidence, {ratio.count} rounds"
    return f"{ratio.middle:.3f} times the defaults ({between})"
