"""How much a median of repeated figures can be trusted, and a ratio of two of them.

The interval is the bootstrap's standard error of the median of the logarithms (``scipy.stats.bootstrap``) on both
sides, times Student's t, and widened by n / (n - 1) for what resampling few figures misses (Hesterberg, What Teachers
Should Know About the Bootstrap, 2015). A median takes no notice of a run that something disturbed, and of figures that
are taken in rounds each ratio is one of neighbours, so that a drift of the machine cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99  # of equal settings one in a hundred is called different
LEAST = 3  # figures of which there is an interval
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where it lies with :data:`CONFIDENCE` or what else was asked for.

    Attributes:
        middle: the estimate.
        count: the figures, or pairs of figures, that it is of; of two series the shorter one's.
        paired: whether it is of the ratios of neighbours.
    """

    middle: float
    low: float
    high: float
    count: int
    paired: bool = False

    @property
    def width(self) -> float:
        """(high - low) / middle."""
        return (self.high - self.low) / self.middle

    @property
    def clear(self) -> bool:
        """Of a ratio: whether the two differ, for 1 is not in it."""
        return not self.low <= 1.0 <= self.high


def of_median(figures: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Returns the interval of the median of positive ``figures``; None of fewer than :data:`LEAST`."""
    if len(figures) < LEAST:
        return None
    return _around(statistics.median(figures), _log_variance(figures), len(figures) - 1, confidence, len(figures))


def of_ratio(figures: Sequence[float], to: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Returns the interval of the ratio of two medians, of figures that were not taken in rounds.

    What the machine did between the two series is not in it. None where either has fewer than :data:`LEAST`.
    """
    if min(len(figures), len(to)) < LEAST:
        return None
    variance, its_variance = _log_variance(figures), _log_variance(to)
    total = variance + its_variance
    freedom = min(len(figures), len(to)) - 1.0
    if total:  # Welch's
        freedom = total**2 / (variance**2 / (len(figures) - 1) + its_variance**2 / (len(to) - 1))
    ratio = statistics.median(figures) / statistics.median(to)
    return _around(ratio, total, freedom, confidence, min(len(figures), len(to)))


def of_rounds(
    figures: Mapping[Hashable, float], to: Mapping[Hashable, float], confidence: float = CONFIDENCE
) -> Interval | None:
    """Returns the interval of the median ratio of the figures of the same rounds; None of fewer than :data:`LEAST`.

    Args:
        figures: by round.
        to: what they are divided by, by round.
    """
    ratios = [figures[name] / to[name] for name in figures if name in to]
    if len(ratios) < LEAST:
        return None
    variance = _log_variance(ratios)
    return _around(statistics.median(ratios), variance, len(ratios) - 1, confidence, len(ratios), paired=True)


def _log_variance(figures: Sequence[float]) -> float:
    """Returns the variance of the median of the figures' logarithms."""
    if min(figures) == max(figures):
        return 0.0
    import numpy
    from scipy.stats import bootstrap

    logs = numpy.log(numpy.asarray(figures, dtype=float))
    drawn = bootstrap((logs,), numpy.median, n_resamples=RESAMPLES, method="percentile", random_state=0)
    return float(drawn.standard_error) ** 2 * len(logs) / (len(logs) - 1)


def _around(
    middle: float, variance: float, freedom: float, confidence: float, count: int, paired: bool = False
) -> Interval:
    from scipy.special import stdtrit

    # exp of more would be no number; an interval that wide says nothing anyway
    factor = math.exp(min(float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance), 300.0))
    return Interval(middle, middle / factor, middle * factor, count, paired)
