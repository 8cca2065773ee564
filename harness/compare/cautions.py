"""What is to be known of single runs before their figures are believed, whatever they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.compare.groups import Group
from harness.results.disturbance import NOISY
from harness.results.power_limit import KEPT, sentence

NAMED = 4  # runs, one by one


def cautions(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a line on runs beside which others were at work, and one on each that did not keep its power limit."""
    runs = [run for one in groups for run in one.runs if run.ok]
    shares = {run.run_id: run.numbers.get("others_cpu_share") or 0.0 for run in runs}
    if noisy := [run_id for run_id, share in shares.items() if share >= NOISY]:
        worst = max(noisy, key=lambda run_id: shares[run_id])
        yield (
            f"{len(noisy)} of {len(runs)} runs were not alone on their machine: other processes took up to "
            f"{shares[worst]:.1%} of the CPU time of a run's cores ({worst})"
        )
    limits = ((run.run_id, run.power()) for run in runs)
    judged = [f"{run_id}: {sentence(power)}" for run_id, power in limits if power and power["verdict"] != KEPT]
    yield from judged[:NAMED]
    if len(judged) > NAMED:
        yield f"{len(judged) - NAMED} more runs did not keep their power limit, or cannot tell"
