"""Finds the factors of the pass times from the passes of real runs: least squares on relative errors.

Factors are sought as logarithms, so that none becomes negative, and each is drawn to where it is assumed to be: what
the passes do not tell stays there, and is named. A pass counts as much as it took, so that the sum over a run, which is
what is to be predicted, comes out right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from harness.costs.roofline import HOST, NAMES, Factors, Host, Roofline, on_other_ranks
from harness.costs.work import PassWork

PASS = tuple(name for name in NAMES if name not in HOST)
LEAST_OF_A_KIND = 3  # passes, to speak of a kind
FOLDS = 5
APART = math.log(4)  # how far from what is assumed a factor is expected to be
APART_BY_RANKS = math.log(1.4)  # how far those of another number of ranks on a host
FURTHEST = math.log(1000)
NOISE = 0.1  # of a pass, relative, until the passes have told theirs
LEAST_NOISE = 0.02
OUTLIER = 5.0  # standard deviations, and at least:
LEAST_OUTLIER = 0.25
TOLD = 0.7  # a factor is told by the passes if they leave less than this of what was assumed of it

Array = Any  # numpy's arrays of floats


@dataclass(frozen=True, slots=True)
class Observed:
    """The passes of a run's rank 0, and what its host did besides.

    Attributes:
        work: an array a count, one element a pass.
        started, seconds: of each pass.
        finished: requests that had finished since the pass before; None where other replicas' are among them.
        roofline: of a rank of the run.
        ranks: on its host.
        tokenize_s, detokenize_s: of a replica; ``prompt_tokens``, ``completed``: of all.
        replicas: of the run.
    """

    name: str
    work: PassWork
    started: Array
    seconds: Array
    finished: Array | None
    roofline: Roofline
    ranks: int
    tokenize_s: float
    detokenize_s: float
    prompt_tokens: int
    completed: int
    replicas: int

    def part(self, chosen: Array) -> Observed:
        """Returns the same with some of the passes."""
        columns: Sequence[Array] = self.work
        work = PassWork(*(column[chosen] for column in columns))
        return replace(self, work=work, started=self.started[chosen], seconds=self.seconds[chosen], finished=None)

    def kinds(self) -> dict[str, Array]:
        """Returns which passes hold prompts alone, both, and decodes alone."""
        prompts, decodes = self.work.prompt_tokens > 0, self.work.decode_tokens > 0  # type: ignore[attr-defined]
        return {"prefill": prompts & ~decodes, "mixed": prompts & decodes, "decode": ~prompts & decodes}


class Found(NamedTuple):
    """What a fit found.

    Attributes:
        factors: by ranks on a host.
        untold: by ranks on a host, the factors that the passes do not tell.
        dropped: passes that were left out as outliers.
    """

    factors: dict[int, Factors]
    untold: dict[int, list[str]]
    dropped: int


def kinds_seen(runs: Sequence[Observed]) -> list[str]:
    """Returns the kinds of pass of which there are enough to fit."""
    counts: dict[str, int] = {}
    for run in runs:
        for kind, chosen in run.kinds().items():
            counts[kind] = counts.get(kind, 0) + int(chosen.sum())
    return [kind for kind, count in counts.items() if count >= LEAST_OF_A_KIND]


def fit(runs: Sequence[Observed], assumed: Factors, host: Host | None, own_hosts: bool = True) -> Found:
    """Returns the factors of the runs' passes and of their hosts.

    One set for all ranks first, each number of ranks on a host with what it is assumed to do to the others; then each
    number's own, drawn to that.

    Args:
        assumed: what is taken where the passes do not tell, of one rank on a host.
        host: of a CPU, None for GPUs.
        own_hosts: whether to find the hosts' factors too, for which all passes of a run must be there.
    """
    seen = sorted({run.ranks for run in runs})

    def of_run(factors: Factors, run: Observed) -> Factors:
        return on_other_ranks(factors, 1, run.ranks, host)

    near, _ = _solve(runs, assumed, APART, NOISE, of_run)  # from far off, passes must not count less for being far off
    first, _ = _solve(runs, near, APART, NOISE, of_run, assumed=assumed, robust=True)
    errors = np.concatenate([_errors(run, of_run(first, run)) for run in runs])
    middle = float(np.median(errors))
    spread = max(1.4826 * float(np.median(np.abs(errors - middle))), LEAST_NOISE)
    most = max(OUTLIER * spread, LEAST_OUTLIER)
    kept = [run.part(np.abs(_errors(run, of_run(first, run)) - middle) < most) for run in runs]
    dropped = len(errors) - sum(len(run.seconds) for run in kept)
    base, told = _solve(kept, first_guess(assumed, first), APART, spread, of_run, assumed=assumed)
    factors, untold = {}, {}
    for ranks in seen:
        own, own_told = on_other_ranks(base, 1, ranks, host), told
        mine = [run for run in kept if run.ranks == ranks]
        if len(seen) > 1:
            own, own_told = _solve(mine, own, APART_BY_RANKS, spread, lambda factors, run: factors)
        own = _in_sum(mine, own)
        between = host_factors([run for run in runs if run.ranks == ranks], assumed) if own_hosts else {}
        factors[ranks] = replace(own, **between)
        useless = () if any(run.roofline.reduces for run in runs) else ("all_reduce", "all_reduce_s")
        untold[ranks] = [name for name in PASS if name not in useless and not (own_told[name] or told[name])]
    return Found(factors, untold, dropped)


def _in_sum(runs: Sequence[Observed], factors: Factors) -> Factors:
    """Returns the factors times what makes the passes' sum that which was measured."""
    scale = sum(float(run.seconds.sum()) for run in runs) / sum(float(predicted(run, factors).sum()) for run in runs)
    return replace(factors, **{name: getattr(factors, name) * scale for name in PASS if name != "norm"})


def first_guess(assumed: Factors, found: Factors) -> Factors:
    """Returns where to begin: what was found, as far as it is within reach of what is assumed."""
    values = {
        name: min(max(value, getattr(assumed, name) / 100), getattr(assumed, name) * 100)
        for name, value in asdict(found).items()
    }
    return Factors(**values)


def _solve(
    runs: Sequence[Observed],
    start: Factors,
    apart: float,
    noise: float,
    of_run: Callable[[Factors, Observed], Factors],
    assumed: Factors | None = None,
    robust: bool = False,
) -> tuple[Factors, dict[str, bool]]:
    """Returns the factors of the least squares, and which of them the passes tell.

    Args:
        apart: standard deviation of a factor's logarithm from that of ``assumed`` (``start`` where that is None).
        noise: standard deviation of a pass's relative error.
        of_run: what the factors are for a run's number of ranks.
        robust: whether passes that are far off count less.
    """
    from scipy.optimize import least_squares

    center = np.log([getattr(assumed or start, name) for name in PASS])
    begin = np.log([getattr(start, name) for name in PASS]) - center
    mean = float(np.mean(np.concatenate([run.seconds for run in runs])))
    weights = [np.sqrt(np.clip(run.seconds / mean, 0.05, 20.0)) / noise for run in runs]

    def factors_of(theta: Array) -> Factors:
        values = dict(zip(PASS, np.exp(theta + center).tolist(), strict=True))
        return replace(start, **values | {"norm": max(values["norm"], 1.0)})

    def residuals(theta: Array) -> Array:
        factors = factors_of(theta)
        found = [weight * _errors(run, of_run(factors, run)) for run, weight in zip(runs, weights, strict=True)]
        return np.concatenate([*found, theta / apart])

    low = np.full(len(PASS), -FURTHEST)
    low[PASS.index("norm")] = -center[PASS.index("norm")]
    solved = least_squares(
        residuals,
        np.clip(begin, low + 1e-9, FURTHEST - 1e-9),
        bounds=(low - 1e-6, FURTHEST),
        loss="soft_l1" if robust else "linear",
    )
    spread = np.sqrt(np.diag(np.linalg.pinv(solved.jac.T @ solved.jac)))
    return factors_of(solved.x), dict(zip(PASS, (spread < TOLD * apart).tolist(), strict=True))


def predicted(run: Observed, factors: Factors) -> Array:
    """Returns the seconds of each pass."""
    return sum(run.roofline.parts(factors, run.work).values())


def _errors(run: Observed, factors: Factors) -> Array:
    """Returns the logarithm of predicted over measured, which is the relative error where it is small."""
    return np.log(predicted(run, factors) / run.seconds)


def host_factors(runs: Sequence[Observed], assumed: Factors) -> dict[str, float]:
    """Returns the factors of the host, from what lies between the passes of runs and from what the record says.

    Passes and sequences count by the gaps in which nothing finished, as far as that is known; what all gaps together
    have beyond that is the finished requests'.
    """
    gaps, sequences, quiet = [], [], []
    total = finished = 0.0
    for run in runs:
        between = run.started[1:] - (run.started + run.seconds)[:-1]
        after = np.asarray(run.work.sequences)[1:]
        gaps.append(between)
        sequences.append(after)
        quiet.append(np.ones(len(between), bool) if run.finished is None else run.finished[1:] == 0)
        total += float(between.sum())
        total += float(run.started[0]) - run.tokenize_s if len(run.started) else 0.0
        finished += run.completed / run.replicas
    every, beside, chosen = np.concatenate(gaps), np.concatenate(sequences), np.concatenate(quiet)
    if chosen.sum() >= LEAST_OF_A_KIND:
        per_pass, per_sequence = _line(beside[chosen], every[chosen])
    else:
        per_pass, per_sequence = assumed.host_pass_s, assumed.host_sequence_s
    rest = total - per_pass * (len(every) + len(runs)) - per_sequence * float(beside.sum())
    tokens = sum(run.prompt_tokens / run.replicas for run in runs)
    return {
        "host_pass_s": per_pass,
        "host_sequence_s": per_sequence,
        "host_finished_s": max(rest / finished, 0.0) if finished else assumed.host_finished_s,
        "host_token_s": sum(run.tokenize_s for run in runs) / tokens if tokens else assumed.host_token_s,
    }


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Returns intercept and slope, neither negative, of the line that few points far off do not move."""
    from scipy.optimize import least_squares

    scale = max(float(np.median(y)), 1e-6)
    found = least_squares(
        lambda p: p[0] + p[1] * x - y / scale, [0.9, 0.01], bounds=(0, np.inf), loss="soft_l1", f_scale=0.3
    )
    return float(found.x[0]) * scale, float(found.x[1]) * scale


def total_seconds(run: Observed, factors: Factors) -> tuple[float, float]:
    """Returns what a run's passes and the host between them take, predicted and measured."""
    finished = run.completed / run.replicas
    host = factors.host_pass_s * len(run.seconds) + factors.host_sequence_s * float(np.sum(run.work.sequences))
    host += factors.host_finished_s * finished + factors.host_token_s * run.prompt_tokens / run.replicas
    return float(predicted(run, factors).sum()) + host, float(run.started[-1] + run.seconds[-1])


class Errors(NamedTuple):
    """How far predictions were off: ``median`` and ``p90`` of the passes' relative errors, ``bias`` of their sum."""

    passes: int
    share: float  # of all passes' time
    median: float
    p90: float
    bias: float


def held_out(runs: Sequence[Observed], assumed: Factors, host: Host | None) -> dict[str, Errors]:
    """Returns the errors of each kind of pass, each pass predicted by a fit of the others."""
    rng = np.random.default_rng(0)
    folds = [rng.permutation(len(run.seconds)) % FOLDS for run in runs]
    measured: dict[str, list[Array]] = {}
    for fold in range(FOLDS):
        train = [run.part(number != fold) for run, number in zip(runs, folds, strict=True)]
        found = fit(train, assumed, host, own_hosts=False)
        for run, number in zip(runs, folds, strict=True):
            test = run.part(number == fold)
            for kind, chosen in test.kinds().items():
                pairs = np.stack([predicted(test, found.factors[run.ranks])[chosen], test.seconds[chosen]])
                measured.setdefault(kind, []).append(pairs)
    whole = sum(float(run.seconds.sum()) for run in runs)
    return {kind: _summed_up(np.concatenate(pairs, axis=1), whole) for kind, pairs in measured.items()}


def _summed_up(pairs: Array, whole: float) -> Errors:
    """Returns the errors of (predicted, measured) passes."""
    guessed, took = pairs
    if not len(took):
        return Errors(0, 0.0, 0.0, 0.0, 0.0)
    off = np.abs(guessed / took - 1)
    median, high = np.percentile(off, [50, 90]).tolist()
    return Errors(len(took), float(took.sum()) / whole, median, high, float(guessed.sum() / took.sum()) - 1)


def left_out(runs: Sequence[Observed], assumed: Factors, host: Host | None) -> dict[str, float]:
    """Returns by how much each run's time is off, relatively, when it is predicted by a fit of the others."""
    found = {}
    for number, run in enumerate(runs):
        others = [other for place, other in enumerate(runs) if place != number]
        if len(kinds_seen(others)) < 2:
            continue
        factors = fit(others, assumed, host).factors
        seen = min(factors, key=lambda ranks: abs(math.log(ranks / run.ranks)))
        guessed, took = total_seconds(run, on_other_ranks(factors[seen], seen, run.ranks, host))
        found[run.name] = guessed / took - 1
    return found


def totals(runs: Sequence[Observed], factors: Mapping[int, Factors]) -> dict[str, float]:
    """Returns by how much each run's time is off, relatively, with the factors of all."""
    found = {}
    for run in runs:
        guessed, took = total_seconds(run, factors[run.ranks])
        found[run.name] = guessed / took - 1
    return found
