"""When a token that is not the reference's best is a near-tie, and when it is an error.

The gap of a token is the distance of its logit below the best one, in standard deviations of the logits of that
position. In logits it would mean something else for each model: those of the demo model spread by 3.3, those of random
weights by a tenth of that. The reference is Hugging Face's model in float32, fed the prompt and the very tokens that
the run had chosen before (teacher-forced).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError

# About twice the largest gap that Hugging Face's own rounding makes in that type: 0.087 in bfloat16 and 0.0099 in
# float16, of 3,126 tokens (launch/measure_rounding.py; results/NOTES.md, "Near-ties"). In float32 no token changed; the
# bound is 25 times what its logits move by against float64. At 0.2 a wrong token has one chance in six of passing, if
# it is the second best of its position, at 1e-3 one in a thousand: where a proof is wanted, run in float32.
BOUNDS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.2}
COARSE_REFERENCE = 2.0  # a reference in the run's own type rounds as much as the run does


@dataclass(frozen=True, slots=True)
class Scores:
    """How the reference sees one completion, by position.

    Attributes:
        gaps: of the run's tokens, standard deviations below the best; inf for an id that the model has not.
        best: the reference's own choice there.
        spread: standard deviation of the logits there, in logits.
    """

    gaps: list[float]
    best: list[int]
    spread: list[float]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One completion, judged.

    Attributes:
        first: position of the first token that is not the reference's best, None if all are.
        worst: position of the largest gap; None if all tokens are the best.
        wrong: position of the first token whose gap is above the bound.
    """

    index: int
    tokens: int
    scores: Scores
    first: int | None
    worst: int | None
    wrong: int | None

    @property
    def largest(self) -> float:
        """The largest gap, 0 if all tokens are the reference's best."""
        return 0.0 if self.worst is None else self.scores.gaps[self.worst]


def judge(index: int, scores: Scores, bound: float) -> Judgement:
    """Judges one completion: each of its tokens must be the best or a near-tie."""
    gaps = scores.gaps
    off = [place for place, gap in enumerate(gaps) if not gap <= 0]  # also what is not a number
    return Judgement(
        index=index,
        tokens=len(gaps),
        scores=scores,
        first=off[0] if off else None,
        worst=max(off, key=lambda place: gaps[place]) if off else None,
        wrong=next((place for place in off if not gaps[place] <= bound), None),
    )


def bound_for(*dtypes: Any, quantized: bool = False, given: float | None = None) -> float:
    """Returns the largest gap of a near-tie: what was given, or that of the least exact of the types.

    Raises:
        UserError: none was given, and there is none for a type that is not known, or for quantized weights.
    """
    if given is not None:
        return given
    remedy = "give the largest gap that you take for rounding as --bound X"
    if quantized:
        raise UserError("--bound", "the runs' weights are quantized, which moves logits by more than rounding", remedy)
    unknown = [dtype for dtype in dtypes if dtype not in BOUNDS]
    if unknown:
        raise UserError("--bound", f"there is no bound for tokens computed in {unknown[0]!r}", remedy)
    return max(BOUNDS[dtype] for dtype in dtypes)


def finite(gap: float) -> float | None:
    """Returns a gap as JSON has it: None for one without end."""
    return gap if math.isfinite(gap) else None
