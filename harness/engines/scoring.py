"""How likely an engine's own kernels find given tokens: what perplexity and log-likelihood tasks are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from harness.basics.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation to be scored: ``target_ids`` after ``context_ids``, at least one token each."""

    index: int
    context_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True, slots=True)
class Score:
    """What came of a :class:`Scored`.

    Attributes:
        logprobs: for each target token, the natural logarithm of its probability after all tokens before it.
        greedy: whether each target token is the most likely one.
        error: why it was not scored; ``logprobs`` is then empty.
    """

    index: int
    logprobs: list[float]
    greedy: bool
    error: str | None = None


class Forced:
    """Continuations of equal length that differ in their last token alone, as a question's choices: computed once.

    The model is fed the context and then the target's tokens, whatever it would have chosen itself.

    Attributes:
        context: the ids that are fed before the first score.
        target: the ids that are scored; the last one, of which each item has its own, is not fed.
    """

    def __init__(self, items: Sequence[Scored]) -> None:
        self.items = items
        self.context, self.target = items[0].context_ids, items[0].target_ids
        self.logprobs: list[float] = []
        self.greedy = True
        self.scores: list[Score] = []

    def wanted(self, place: int) -> list[int]:
        """Returns the ids whose log-probabilities count at ``place`` of the target: one, at the end each item's own."""
        last = place == len(self.target) - 1
        return [item.target_ids[place] for item in self.items] if last else [self.target[place]]

    def take(self, logprobs: list[float], best: int) -> int:
        """Books the log-probabilities of the next :meth:`wanted` ids and the most likely id; returns the id to feed."""
        ids = self.wanted(len(self.logprobs))
        if any(math.isnan(logprob) for logprob in logprobs):
            raise FloatingPointError("the model's logits are not numbers")
        if len(self.logprobs) == len(self.target) - 1:
            self.scores = [
                Score(item.index, [*self.logprobs, logprob], self.greedy and token == best)
                for item, token, logprob in zip(self.items, ids, logprobs, strict=True)
            ]
        self.logprobs.append(logprobs[0])
        self.greedy = self.greedy and ids[0] == best
        return ids[0]

    def refused(self, reason: str) -> list[Score]:
        """Returns what stands for the items when they are not computed."""
        return [Score(item.index, [], False, reason) for item in self.items]


def grouped(items: Iterable[Scored]) -> Iterator[Forced]:
    """Yields the items in order, neighbours together where one computation is enough for them."""
    for _, group in groupby(items, key=lambda item: (item.context_ids, item.target_ids[:-1], not item.target_ids)):
        yield Forced(list(group))


def force(logits: Tensor, rows: Sequence[Forced]) -> list[int]:
    """Books a pass: float32 log-softmax of ``logits``, ``[rows, vocab]``; returns the id to feed after each row.

    Args:
        rows: whose logits these are; several rows of one are of consecutive tokens.

    Raises:
        FloatingPointError: a logit that counts is not a number.
    """
    import torch

    ahead: Counter[int] = Counter()
    wanted = []
    for row in rows:
        wanted.append(row.wanted(len(row.logprobs) + ahead[id(row)]))
        ahead[id(row)] += 1
    places = torch.tensor([number for number, ids in enumerate(wanted) for _ in ids], dtype=torch.int64)
    ids = torch.tensor([token for tokens in wanted for token in tokens], dtype=torch.int64)
    found = logits.float().log_softmax(-1)[places.to(logits.device), ids.to(logits.device)].tolist()
    best = logits.argmax(-1).tolist()
    tokens, at = [], 0
    for number, row in enumerate(rows):
        count = len(wanted[number])
        tokens.append(row.take(found[at : at + count], best[number]))
        at += count
    return tokens


def no_prefill(who: str) -> UserError:
    """Returns the error for an engine or for kernels that give logits of a prompt's last token alone."""
    return UserError("--prefill", f"{who} gives no logits within a prompt", "leave it out: decode steps give the same")
