"""How large FastGen's passes are where nobody has said it: tokens of a pass, and sequences running at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.memory import gib
from harness.costs.shape import ModelShape

CPU_BUDGET, CPU_SEQUENCES = 512, 64  # measured: results/NOTES.md
LARGE_CARD = 40e9  # bytes: a data-center GPU
KNEES = 8  # a pass of so many times the knee reads the weights in an eighth of the time that its products take
STEP = 64  # sequences are a multiple of this
# The part of the free memory that is the KV cache: a CPU's is not ours alone, and what a GPU is left with once passes
# were tried is for what a library may still want.
CACHE_PARTS = {"cpu": 0.3, "cuda": 0.9}


class Range(NamedTuple):
    """What the sizes may be on a kind of GPU."""

    budget: tuple[int, int]
    sequences: tuple[int, int]


LARGE, SMALL = Range((2048, 8192), (256, 1024)), Range((512, 2048), (64, 256))


@dataclass(frozen=True, slots=True)
class PassSizes:
    """``engine.token_budget`` and ``engine.max_sequences``, and why they are what they are.

    Attributes:
        asked: both as the config has them; None is to be chosen.
    """

    asked: tuple[int | None, int | None]
    token_budget: int
    max_sequences: int
    why: str

    @property
    def record(self) -> dict[str, object]:
        """What the record says of it."""
        asked = {"token_budget": self.asked[0], "max_sequences": self.asked[1]}
        return {
            "asked": asked,
            "token_budget": self.token_budget,
            "max_sequences": self.max_sequences,
            "why": self.why,
        }


def knee(hardware: HardwareConfig, dtype: str, shape: ModelShape | None) -> float | None:
    """Returns the tokens of a pass at which its products take as long as reading the weights; None if not known.

    2 FLOPs an element and token, at the peak, against the bytes of an element at the memory's bandwidth. Tensor
    parallelism divides both.
    """
    peak, bandwidth = hardware.peak_flops.get(dtype), hardware.memory_bandwidth
    if hardware.accelerator is Accelerator.cpu or not peak or not bandwidth or shape is None:
        return None
    return peak * shape.weight_bytes / (2 * bandwidth)


def choose(
    asked: tuple[int | None, int | None],
    accelerator: str,
    memory: int | None,
    compute_bound_from: float | None,
    fitting: float | None,
) -> PassSizes:
    """Returns the sizes: what is given stays as it is, and the other follows.

    On a CPU they are what was measured best. On a GPU the budget is the power of two from :data:`KNEES` times the
    knee on, and there are as many sequences as the KV cache holds of the dataset's mean length, both within the range
    of the card. A budget is never below the sequences, which take a token of each pass.

    Args:
        memory: bytes of a device; None where nobody knows.
        compute_bound_from: :func:`knee`.
        fitting: sequences of the mean length that a replica's KV cache holds; None where nobody knows.
    """
    if accelerator == "cpu":
        return _joined(asked, CPU_BUDGET, CPU_SEQUENCES, "what was measured on CPUs")
    budgets, counts = LARGE if memory is not None and memory >= LARGE_CARD else SMALL
    reasons = ["a GPU of unknown memory" if memory is None else f"a GPU of {gib(memory)}"]
    budget, sequences = budgets[0], counts[0]
    if compute_bound_from is None:
        reasons.append("from how many tokens on its products bound a pass is not known")
    else:
        budget, limited = _within(_power_of_two(KNEES * compute_bound_from), budgets)
        reasons.append(f"its products bound a pass from {compute_bound_from:,.0f} tokens on{limited}")
    if fitting is None:
        reasons.append("how many sequences the KV cache holds is not known")
    else:
        sequences, limited = _within(int(fitting) // STEP * STEP, counts)
        reasons.append(f"the KV cache holds about {fitting:,.0f} sequences of the dataset's mean length{limited}")
    return _joined(asked, budget, sequences, ", ".join(reasons))


def _joined(asked: tuple[int | None, int | None], budget: int, sequences: int, why: str) -> PassSizes:
    """Returns the sizes that are given, or else these, none of them against the other."""
    given_budget, given_sequences = asked
    if given_sequences is not None:
        sequences = given_sequences
        budget = max(budget, sequences)
    if given_budget is not None:
        budget = given_budget
        if given_sequences is None:
            sequences = min(sequences, budget)
    return PassSizes(asked, budget, sequences, why)


def _within(wanted: int, limits: tuple[int, int]) -> tuple[int, str]:
    """Returns the nearest to ``wanted`` within the limits, and what is to be said where that is another."""
    least, most = limits
    if wanted < least:
        return least, f" ({least:,} is the least)"
    return (most, f" ({most:,} is the most)") if wanted > most else (wanted, "")


def _power_of_two(number: float) -> int:
    """Returns the smallest power of two that is not below ``number``."""
    power = 1
    while power < number:
        power *= 2
    return power
