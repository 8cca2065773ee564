"""``parallel=auto``: how the ranks of a launch are split into replicas, by what fits. Plain sums, nothing imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError

FITS = "each rank has room for the whole model"
UNKNOWN = "whole replicas, since what the model takes, or the memory, is not known before it is loaded"
NODES = "a replica for each NUMA node"
BY_HAND = "set parallel.tp and parallel.dp by hand"


@dataclass(frozen=True, slots=True)
class Launch:
    """The ranks there are to split.

    Attributes:
        ranks: of the launch; None where there is none yet, and as few are started as it takes.
        host_ranks: of them on this host; without a launch, the most that this machine can be asked for.
        fixed: whether it must be split without a rest. A sweep's jobs are launches of their own and need not.
        nodes: NUMA nodes of this host that get a replica each where there is no launch yet.
    """

    ranks: int | None
    host_ranks: int
    fixed: bool = True
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Split:
    """``tp`` ranks share a model, ``dp`` replicas share the requests.

    Attributes:
        asked: what the config says, (tp, dp); None is to be chosen.
        why: the reason for what was chosen, in a clause.
    """

    asked: tuple[int | None, int | None]
    tp: int
    dp: int
    why: str

    @property
    def chosen(self) -> bool:
        """Whether something of it was not given."""
        return None in self.asked

    @property
    def record(self) -> dict[str, Any]:
        """What the record says of it."""
        asked = {"tp": self.asked[0], "dp": self.asked[1]}
        return {"asked": asked, "tp": self.tp, "dp": self.dp, "why": self.why}


def choose(
    asked: tuple[int | None, int | None],
    launch: Launch,
    lacks: Callable[[int, int], str | None],
    refusal: Callable[[int, int], UserError | None],
    fits: str = FITS,
) -> Split:
    """Returns how the ranks are split: whole replicas where they fit, else the smallest tp that does.

    What is given wins, and is not questioned here; nor is a split that has no alternative. The checks of the run see
    to both.

    Args:
        asked: tp and dp as given, None for what is to be chosen.
        lacks: what (tp, ranks of a host) lack of memory, None for nothing.
        refusal: why (tp, dp) cannot be run, whatever the memory; None when they can.
        fits: the reason for the best split that there is, where nothing speaks against it.

    Raises:
        UserError: the launch cannot be split so, or nothing fits.
    """
    tp, dp = asked
    if tp is not None and dp is not None:
        return Split(asked, tp, dp, "as given")
    if (given := tp or dp) is not None and launch.ranks is not None and launch.fixed and launch.ranks % given:
        raise UserError(
            "parallel.tp" if tp else "parallel.dp",
            f"{given} does not divide the {launch.ranks} ranks of the launch",
            f"launch with a multiple of {given}, or give another number",
        )
    pairs = _pairs(tp, dp, launch)
    if len(pairs) == 1:
        return Split(asked, *pairs[0], _only(tp, dp, launch))
    most = max(launch.host_ranks, launch.nodes)
    reasons: list[str] = []
    first: UserError | None = None
    for pair in pairs:
        if launch.nodes > 1 and pair == (1, 1):
            return Split(asked, 1, 1, f"one rank on {launch.nodes} NUMA nodes: {reasons[0]}")
        if (refused := refusal(*pair)) is not None:
            first = first or refused
            reasons.append(f"{refused.field}={refused.found}")
        elif (missing := lacks(pair[0], min(most, pair[0] * pair[1]))) is not None:
            reasons.append(missing)
        else:
            return Split(asked, *pair, reasons[0] if reasons else fits)
    remedy = f"{first.remedy}, or use" if first is not None and first.remedy else "use"
    raise UserError("parallel", f"auto: {_said(reasons)}", f"{remedy} more ranks or a smaller model, or {BY_HAND}")


def _pairs(tp: int | None, dp: int | None, launch: Launch) -> list[tuple[int, int]]:
    """Returns what comes into question, (tp, dp), the best first; a replica that stays on a host before others."""
    ranks = launch.ranks
    if tp is not None:
        return [(tp, max(1, (ranks or 1) // tp))]
    if dp is not None:
        if ranks is not None and launch.fixed:
            return [(ranks // dp, dp)]
        return [(size, dp) for size in range(1, max(1, (ranks or launch.host_ranks) // dp) + 1)]
    if ranks is None and launch.nodes > 1:
        return [(1, count) for count in range(launch.nodes, 0, -1)]
    if ranks is None:
        return [(size, 1) for size in range(1, max(1, launch.host_ranks) + 1)]
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    sizes.sort(key=lambda size: (launch.host_ranks % size > 0, size))
    return [(size, ranks // size) for size in sizes]


def _only(tp: int | None, dp: int | None, launch: Launch) -> str:
    if (tp, dp) == (None, None):
        return "the launch has one rank" if launch.ranks == 1 else "one rank where no launch brings more"
    follows, given = ("dp", "tp") if dp is None else ("tp", "dp")
    return f"{follows} follows from parallel.{given}" + (f" and {launch.ranks} ranks" if launch.ranks else "")


def _said(reasons: list[str]) -> str:
    """Returns the first reason and the last, which is the largest tp's."""
    return "; ".join(dict.fromkeys([reasons[0], reasons[-1]]))
