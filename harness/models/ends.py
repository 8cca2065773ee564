"""What ends a request before its ``output_len``: end-of-sequence ids, stop ids, stop strings; and its text then.

A stop string ends a request as in Hugging Face's ``generate(stop_strings=...)``: with the first generated token that
completes it, whatever follows it in that token, and wherever it began, be it at the end of the prompt. Tokens are
taken for the bytes that they stand for, so that characters which are split over tokens are found, and that no text has
to be made meanwhile: most tokens cost no more than a look whether they could be the last of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.basics.errors import UserError, quoted
from harness.models.architecture import positive_integer

if TYPE_CHECKING:
    from harness.config.schema import GenerationConfig
    from harness.models.source import Source

UNKNOWN = b"\xff"  # for a token without text: no UTF-8 has this byte
Cut = tuple[int, int]  # a token's place in the output, and the byte of it at which a stop string begins


class StopStrings:
    """Finds stop strings in the tokens of one tokenizer.

    Args:
        strings: the stop strings; none is empty.
        pieces: the bytes that each id stands for.
        window: how many tokens a stop string can lie in: as many as the longest has bytes or characters.

    Attributes:
        last_ids: the ids that can be the last of a stop string.
    """

    def __init__(self, strings: Iterable[str], pieces: Mapping[int, bytes], window: int) -> None:
        self._strings = [string.encode() for string in strings]
        self._pieces = pieces
        self.window = window
        endings = tuple({string[place:] for string in self._strings for place in range(len(string))})
        self.last_ids = frozenset(
            token
            for token, piece in pieces.items()
            if piece.startswith(endings) or any(string in piece for string in self._strings)
        )

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: Any) -> StopStrings:
        """Returns those of a transformers tokenizer, whose vocabulary is taken apart as transformers does it.

        Raises:
            UserError: one of them can never come, or the vocabulary cannot be read so.
        """
        from transformers import StopStringCriteria

        try:
            mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
            texts, ids = StopStringCriteria.clean_tokenizer_vocab(tokenizer, stop_string_matching_mode=mode)
        except (AttributeError, TypeError, ValueError) as error:
            found = f"the vocabulary of {type(tokenizer).__name__} cannot be read as text"
            raise UserError("generation.stop_strings", found, "give generation.stop_token_ids instead") from error
        pieces = {
            token: text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
            for token, text in zip(ids, texts, strict=True)
        }
        window = max(len(string if mode is None else string.encode()) for string in strings)
        for string in strings:
            if not cls([string], pieces, window).last_ids:
                found = f"{quoted(string)} has characters that no token of this model stands for: it never comes"
                raise UserError("generation.stop_strings", found, "leave it out")
        return cls(strings, pieces, window)

    def begin(self, tokens: Sequence[int], place: int) -> Cut | None:
        """Returns where the first stop string begins that ends in the token at ``place``; None if none does."""
        first = max(0, place + 1 - self.window)
        pieces = [self._pieces.get(token, UNKNOWN) for token in tokens[first : place + 1]]
        joined = b"".join(pieces)
        before = len(joined) - len(pieces[-1])
        found = [joined.find(string, max(0, before + 1 - len(string))) for string in self._strings]
        begin = min((one for one in found if one >= 0), default=None)
        if begin is None:
            return None
        for number, piece in enumerate(pieces):
            if begin < len(piece):
                return first + number, begin
            begin -= len(piece)
        raise AssertionError("a stop string is not empty")

    def piece(self, token: int) -> bytes:
        """Returns the bytes that an id stands for."""
        return self._pieces.get(token, UNKNOWN)


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a request.

    Attributes:
        eos: the model's end-of-sequence ids; none under ``generation.stop=length``; None where they are not known.
        stop_ids: ``generation.stop_token_ids``.
        strings: ``generation.stop_strings``; None where there are none.
        watched: the ids with which a request can end.
    """

    eos: frozenset[int] | None = frozenset()
    stop_ids: frozenset[int] = frozenset()
    strings: StopStrings | None = None
    watched: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        last_ids = frozenset() if self.strings is None else self.strings.last_ids
        object.__setattr__(self, "watched", self.ids | last_ids)

    @classmethod
    def of(cls, eos: frozenset[int] | None, generation: GenerationConfig, tokenizer: Any) -> Ends:
        """Returns those of a run; raises UserError for stop strings that can never come.

        Args:
            eos: the model's end-of-sequence ids, as ``generation.stop`` has them.
        """
        strings = StopStrings.of(generation.stop_strings, tokenizer) if generation.stop_strings else None
        return cls(eos, frozenset(generation.stop_token_ids), strings)

    @property
    def ids(self) -> frozenset[int]:
        """The ids that end a request by themselves: Hugging Face's ``eos_token_id``."""
        return (self.eos or frozenset()) | self.stop_ids

    def reason(self, tokens: Sequence[int], place: int) -> str | None:
        """Returns whether a request ends with the token at ``place``: ``eos``, ``stop``, or None if it goes on.

        Args:
            tokens: its prompt and its output, as far as that token at least.
        """
        token = tokens[place]
        if token not in self.watched:
            return None
        if self.eos and token in self.eos:
            return "eos"
        if token in self.stop_ids or (self.strings is not None and self.strings.begin(tokens, place) is not None):
            return "stop"
        return None

    def text(self, decode: Callable[[list[int]], str], prompt: Sequence[int], output: Sequence[int]) -> str:
        """Returns the text of an output, without the stop string or stop id that ended it and what follows it.

        Args:
            decode: the text of ids, special tokens left out.
            prompt: ids before it, in whose end a stop string may begin.
        """
        ids = list(output)
        cut = self._cut(prompt, ids)
        if cut is None:
            return decode(ids)
        place, offset = cut
        if not offset:
            return decode(ids[:place])
        # The token before the stop string's first byte may complete a character that an earlier one has begun.
        assert self.strings is not None
        text, piece = decode(ids[: place + 1]), self.strings.piece(ids[place])
        rest = piece[offset:].decode(errors="replace")
        if text.endswith(rest):
            return text.removesuffix(rest)
        before = decode(ids[:place])  # the token is a special one, or spaces before signs were cleaned up
        return before if text == before else before + piece[:offset].decode(errors="replace")

    def _cut(self, prompt: Sequence[int], ids: list[int]) -> Cut | None:
        last = len(ids) - 1
        if last < 0 or ids[last] not in self.watched:
            return None
        cuts: list[Cut] = [(last, 0)] if ids[last] in self.stop_ids else []
        if self.strings is not None:
            before = list(prompt[-self.strings.window :])
            begin = self.strings.begin([*before, *ids], len(before) + last)
            if begin is not None:
                cuts.append((begin[0] - len(before), begin[1]) if begin[0] >= len(before) else (0, 0))
        return min(cuts, default=None)


def check(generation: GenerationConfig, source: Source) -> None:
    """Refuses what cannot end a request of this model, before anything of it is loaded; raises UserError."""
    vocabulary = positive_integer(source.architecture.get("vocab_size"))
    foreign = [token for token in generation.stop_token_ids if vocabulary and token >= vocabulary]
    if foreign:
        found = f"{foreign[0]} is no id of this model, which has {vocabulary}"
        raise UserError("generation.stop_token_ids", found, f"give ids from 0 to {vocabulary - 1}")
    if generation.stop_strings and source.tokenizer is None:
        found = f"{quoted(generation.stop_strings[0])}: dummy weights without a tokenizer have no text"
        raise UserError("generation.stop_strings", found, "give model.tokenizer=DIR, or leave it out")
