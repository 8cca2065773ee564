"""What a pass computes: sequences, the chunks of them that it feeds, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.costs.work import PassWork
from harness.engines.fastgen.drafts import Lookup


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine.

    Attributes:
        tokens: the prompt's ids, then the generated ones. The last may be ``-(row + 1)``, a placeholder: the id that
            the pass before the next gives in that row of its output, and that has not come yet.
        computed: how many of ``tokens``, from the front, have their keys and values in the cache.
        blocks: numbers of the cache blocks held, in the order of the tokens they hold.
        finish_reason: None while unfinished, then ``eos``, ``stop`` or ``length``.
        slot: its number among the running sequences, from 0, for what a runner keeps of each; -1 while it waits.
        most_tokens: prompt and output.
        keys: of the whole blocks of its prompt, where blocks are shared.
        shared: how many tokens of its prompt were not computed for it, since others had; None before it is admitted.
        lookup: what its drafts are looked up in; None where there are none yet.
    """

    uid: int
    tokens: list[int]
    prompt_len: int
    max_new_tokens: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    slot: int = -1
    most_tokens: int = field(init=False)
    keys: tuple[bytes, ...] = ()
    shared: int | None = None
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        self.most_tokens = self.prompt_len + self.max_new_tokens

    @property
    def output_ids(self) -> list[int]:
        """The generated ids, EOS included."""
        return self.tokens[self.prompt_len :]


# A sequence, the position of its first token in the pass, how many tokens, and "last": whether its newest is there too.
# A plain tuple, for a pass makes and unpacks hundreds of them.
Chunk = tuple[Sequence, int, int, bool]


@dataclass(slots=True)
class RaggedBatch:
    """One pass.

    Attributes:
        chunks: in order, decodes first, each one token and its drafts.
        decode_tokens: how many decodes there are, and tokens of theirs without the drafts.
        grown: the sequences whose ``blocks`` are not what they were in the pass before.
    """

    chunks: list[Chunk]
    decode_tokens: int
    prompt_tokens: int
    grown: list[Sequence] = field(default_factory=list)
    draft_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens of the pass."""
        return self.decode_tokens + self.draft_tokens + self.prompt_tokens

    @property
    def token_ids(self) -> list[int]:
        """Their ids, or placeholders, in order."""
        ids: list[int] = []
        for sequence, start, length, _ in self.chunks:
            if length == 1:  # most are: no list for each
                ids.append(sequence.tokens[start])
            else:
                ids += sequence.tokens[start : start + length]
        return ids

    @property
    def rows(self) -> int:
        """Tokens after which the pass gives an id."""
        prompts = self.chunks[self.decode_tokens :]
        return self.decode_tokens + self.draft_tokens + sum([chunk[3] for chunk in prompts])

    @property
    def sampled(self) -> list[int]:
        """Which of its tokens these are, in order: all of the decodes, and of a ``last`` prompt chunk the last."""
        row = self.decode_tokens + self.draft_tokens
        rows = list(range(row))
        for _, _, length, last in self.chunks[self.decode_tokens :]:
            row += length
            if last:
                rows.append(row - 1)
        return rows

    @property
    def work(self) -> PassWork:
        """What the pass costs by."""
        decodes = 0 if self.draft_tokens else self.decode_tokens  # those of one token
        keys = pairs = decodes + sum([chunk[1] for chunk in self.chunks[:decodes]])
        for _, start, length, _ in self.chunks[decodes:]:
            keys += start + length
            pairs += length * (2 * start + length + 1) // 2  # token i of the chunk sees start + i + 1 keys
        decoded = self.decode_tokens + self.draft_tokens
        return PassWork(self.tokens, self.prompt_tokens, decoded, len(self.chunks), self.rows, keys, pairs)
