"""``parallel=auto``: how the ranks of a launch are split into replicas, by what fits. Plain sums, nothing imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError
from harness.workload.records import Request

SEQUENCES = 8  # of the longest request's size that a useful KV cache holds
CHARACTERS_A_TOKEN = 3  # of a prompt that is not tokenized yet
FITS = "each rank has room for the whole model"
UNKNOWN = "whole replicas, since what the model takes, or the memory, is not known before it is loaded"
BY_HAND = "set parallel.tp and parallel.dp by hand"


@dataclass(frozen=True, slots=True)
class Launch:
    """The ranks there are to split.

    Attributes:
        ranks: of the launch; None where there is none yet, and as few are started as it takes.
        host_ranks: of them on this host; without a launch, the most that this machine can be asked for.
        fixed: whether it must be split without a rest. A sweep's jobs are launches of their own and need not.
    """

    ranks: int | None
    host_ranks: int
    fixed: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """What the ranks find on one host.

    Attributes:
        size: bytes of one device, or of the host's memory that is free; None where nobody knows.
        shared: whether the ranks of the host have ``size`` together, as on a CPU.
        own: bytes that each rank takes before it loads a model.
    """

    size: int | None
    shared: bool
    own: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What one replica needs, in bytes.

    Attributes:
        sharded, whole: weights that tensor parallelism divides among the ranks, and those that each rank has.
        token: keys and values of one token, of all ``kv_heads``.
        tokens: of the KV cache that makes a replica useful (:func:`useful_tokens`).
        part: of what the weights leave free, that the engine makes its KV cache of.
        given: bytes of a rank's KV cache where the config says them: then these are useful, and what it takes.
    """

    sharded: int
    whole: int
    token: int
    kv_heads: int
    tokens: int
    part: float = 1.0
    given: int | None = None

    def weights(self, tp: int) -> int:
        """Returns a rank's bytes of weights."""
        return -(-self.sharded // tp) + self.whole

    def useful(self, tp: int) -> int:
        """Returns a rank's bytes of a useful KV cache; a rank has whole heads."""
        if self.given is not None:
            return self.given
        return self.tokens * self.token // self.kv_heads * -(-self.kv_heads // tp)

    def cache(self, left: int) -> int:
        """Returns the bytes of KV cache that the engine makes of what the weights have ``left``."""
        return int(self.part * left) if self.given is None else left


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


def useful_tokens(requests: Sequence[Request], context: int | None, most: int) -> int:
    """Returns how many tokens of KV cache make a replica useful.

    Useful is a cache that holds the longest request of the dataset eight times over, or all requests where they are
    fewer or shorter than that: below some such number every pass reads all the weights for a handful of tokens, and
    sharing the model among more ranks, which leaves each of them more memory, is the better use of them. Prompts are
    not tokenized yet, so their length is the dataset's own claim or a guess from their characters.

    Args:
        context: longest prompt plus output of the model, None where it has no limit.
        most: tokens that the engine ever holds at a time.
    """
    lengths = []
    for request in requests:
        prompt = len(request.prompt_ids or ()) or request.claimed_prompt_len
        length = (prompt or len(request.prompt) // CHARACTERS_A_TOKEN) + 1
        length += request.output_len or len(request.reply or "") // CHARACTERS_A_TOKEN
        lengths.append(length if context is None else min(length, context))
    longest = max(lengths, default=1)
    return max(longest, min(SEQUENCES * longest, sum(lengths), most))


def shortage(tp: int, ranks: int, memory: Memory, needs: Needs | None) -> str | None:
    """Returns what is missing for ``tp`` ranks to share a model; None when they have what they need, or nobody knows.

    Args:
        ranks: of one host.
    """
    if needs is None or memory.size is None:
        return None
    share = memory.size // ranks if memory.shared else memory.size
    left = share - memory.own - needs.weights(tp)
    cache, useful = needs.cache(left), needs.useful(tp)
    if left > 0 and cache >= useful:
        return None
    gets = f", of which the cache gets {_gib(cache)}" if left > 0 else ""
    return (
        f"a rank of tp={tp} needs {_gib(needs.weights(tp))} of weights and {_gib(useful)} of KV cache; "
        f"it has {_gib(share)}{gets}"
    )


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
    reasons: list[str] = []
    first: UserError | None = None
    for pair in pairs:
        if (refused := refusal(*pair)) is not None:
            first = first or refused
            reasons.append(f"{refused.field}={refused.found}")
        elif (missing := lacks(pair[0], min(launch.host_ranks, pair[0] * pair[1]))) is not None:
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
