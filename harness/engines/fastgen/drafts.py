"""Prompt-lookup drafts: what followed the same tokens before, computed on trial in the same pass (Saxena, 2023).

Where the newest tokens of a sequence stand further back too, in its prompt or its output, what followed them there is
drafted. A decode then feeds its newest token and the drafts behind it, and the pass gives an id after each of them. A
draft holds if it is the id that the pass gives before it, and behind one that does not, none does. So every id is the
model's own choice after those before it, as without drafts; what was computed for drafts that do not hold is
overwritten.

Nothing is preempted for a draft: it lies in blocks that its sequence holds. Plain Python, as the scheduler: a draft is
one look-up.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from harness.models.ends import Ends

if TYPE_CHECKING:
    from harness.engines.fastgen.batch import Chunk

NGRAM = 6  # tokens that are looked up; of fewer the sequel holds less often (results/NOTES.md)


class Lookup:
    """Where the n-grams of one sequence stood last; it follows its tokens as they grow."""

    __slots__ = ("_indexed", "_sequels")

    def __init__(self) -> None:
        self._indexed = NGRAM
        self._sequels: dict[tuple[int, ...], int] = {}  # by n-gram, the place behind it

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """Returns what followed the newest tokens before, ``most`` ids; none if they stand nowhere else.

        Args:
            tokens: of the sequence; those of an earlier call, and more.
        """
        end, sequels = len(tokens), self._sequels
        for place in range(self._indexed, end):
            sequels[tuple(tokens[place - NGRAM : place])] = place
        self._indexed = max(end, NGRAM)
        begin = sequels.get(tuple(tokens[-NGRAM:]))
        if begin is None:
            return []
        # The sequel may itself reach the end: what repeats goes on repeating.
        return [tokens[begin + step % (end - begin)] for step in range(most)]


class Drafter:
    """Adds drafts to the decodes of a pass, and finds which of them hold once its ids have come.

    Args:
        most: drafts of a sequence in a pass.

    Attributes:
        drafted: drafts that were computed.
        accepted: those of them that became output.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted = 0
        self.accepted = 0

    def extend(self, decodes: list[Chunk], room: int, block_size: int) -> int:
        """Puts drafts behind the tokens of sequences, the oldest first, and into their chunks; returns how many.

        Args:
            decodes: chunks of one token.
            room: drafts, at most.
        """
        left = room
        for place, (sequence, start, _, last) in enumerate(decodes):
            # The last token that a sequence may have is never fed.
            end = min(len(sequence.blocks) * block_size, sequence.most_tokens - 1)
            most = min(self.most, left, end - start - 1)
            if most < 1:
                continue
            if sequence.lookup is None:
                sequence.lookup = Lookup()
            if drafts := sequence.lookup.draft(sequence.tokens, most):
                sequence.tokens += drafts
                decodes[place] = (sequence, start, 1 + most, last)
                left -= most
        return room - left

    def settle(
        self, decodes: list[Chunk], token_ids: SequenceOf[int], ends: Ends
    ) -> tuple[list[Chunk], SequenceOf[int]]:
        """Takes back what does not hold; returns the decodes as far as they hold, and then an id for each chunk.

        Args:
            decodes: chunks of a pass that was computed.
            token_ids: what it gives after each of their tokens, in order, and then after its prompts.
            ends: what ends a sequence: behind an end nothing holds.
        """
        chunks: list[Chunk] = []
        following: list[int] = []
        row = 0
        for sequence, start, length, last in decodes:
            tokens, holds = sequence.tokens, 1
            while holds < length and tokens[start + holds] == token_ids[row + holds - 1]:
                if ends.reason(tokens, start + holds) is not None:
                    break
                holds += 1
            self.drafted += length - 1
            self.accepted += holds - 1
            sequence.computed = start + holds
            tokens[start + holds :] = [0]  # the place of the id that follows
            chunks.append((sequence, start, holds, last))
            following.append(token_ids[row + holds - 1])
            row += length
        return chunks, following + list(token_ids[row:])
