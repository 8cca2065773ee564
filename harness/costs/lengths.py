"""How long a dataset's requests are, before anything is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from harness.costs.work import PassWork
from harness.workload.lengths import fitted
from harness.workload.records import Request

CHARACTERS_A_TOKEN = 3  # of a text that is not tokenized yet
MESSAGE_TOKENS = 5  # of a chat, that the template adds to each message: its role, its begin and end
CLAIMED = "as the dataset states them"
GUESSED = f"guessed: {CHARACTERS_A_TOKEN} characters a token"


class Length(NamedTuple):
    """Tokens of one request: of its prompt, and at most of its output."""

    prompt: int
    output: int

    @property
    def held(self) -> int:
        """Tokens of the KV cache at its end; the last token is never fed back, so never stored."""
        return self.prompt + self.output - 1


@dataclass(frozen=True)
class Lengths:
    """The requests that are run.

    Attributes:
        source: where the prompts' lengths are from.
        rejected: requests that are longer than the model's context.
    """

    items: list[Length]
    source: str
    rejected: int

    @cached_property
    def prompt_tokens(self) -> int:
        """Sum of the prompts."""
        return sum(length.prompt for length in self.items)

    @cached_property
    def output_tokens(self) -> int:
        """Sum of the outputs."""
        return sum(length.output for length in self.items)

    @cached_property
    def held(self) -> list[int]:
        """:attr:`Length.held` of all, the shortest first."""
        return sorted(length.held for length in self.items)

    @property
    def mean_held(self) -> float:
        """Mean of :attr:`held`."""
        return sum(self.held) / len(self.held)

    @property
    def p99_held(self) -> int:
        """What 99 of 100 do not exceed (nearest rank)."""
        return self.held[-(-99 * len(self.held) // 100) - 1]

    @cached_property
    def prefill(self) -> PassWork:
        """The work of all prompts, each fed at once: its last token gives a row of logits."""
        tokens, count = self.prompt_tokens, len(self.items)
        pairs = sum(length.prompt * (length.prompt + 1) // 2 for length in self.items)
        return PassWork(tokens, tokens, 0, count, count, tokens, pairs)

    @cached_property
    def decode(self) -> PassWork:
        """The work of all tokens after the first of each request, one sequence each."""
        steps = [length.output - 1 for length in self.items]
        tokens = sum(steps)
        # Step k of a request sees its prompt, the k tokens before and itself.
        seen = sum(n * item.prompt + n * (n + 1) // 2 for n, item in zip(steps, self.items, strict=True))
        return PassWork(tokens, 0, tokens, tokens, tokens, seen, seen)


def of(requests: Sequence[Request], context: int | None = None, most_output: int | None = None) -> Lengths:
    """Returns the lengths of ``requests``.

    Args:
        context: longest prompt plus output of the model, None where it has no limit.
        most_output: ``generation.max_output_len``.
    """
    items, rejected, guessed = [], 0, 0
    for request in requests:
        length, guess = _length(request)
        if most_output is not None:
            length = Length(length.prompt, min(length.output, most_output))
        length = Length(*fitted(*length, request.drawn, context))
        if context is not None and sum(length) > context:
            rejected += 1
            continue
        guessed += guess
        items.append(length)
    return Lengths(items, GUESSED if guessed else CLAIMED, rejected)


def guessed_tokens(text: str) -> int:
    """Returns about how many tokens a text has."""
    return max(1, len(text) // CHARACTERS_A_TOKEN)


def uncounted_tokens(request: Request) -> int:
    """Returns how many tokens a prompt has without a tokenizer: those given, or what the dataset claims, or a guess."""
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    turns = MESSAGE_TOKENS * len(request.messages or ())
    return request.claimed_prompt_len or guessed_tokens(text_of(request)) + turns


def text_of(request: Request) -> str:
    """Returns the text of a prompt that is not tokenized yet; empty where there is none."""
    if request.messages is not None:
        return "".join(message.content for message in request.messages)
    return request.prompt or request.like or ""


def _length(request: Request) -> tuple[Length, bool]:
    """Returns the length of a request, and whether it is a guess."""
    guess = not (request.prompt_ids or request.claimed_prompt_len) or not request.output_len
    return Length(uncounted_tokens(request), request.output_len or guessed_tokens(request.reply or "")), guess
