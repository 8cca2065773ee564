"""Stop strings and stop ids: where a request ends, and what its text is then, beside Hugging Face's own rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.tokenizer_kinds import EOS, KINDS, TEXT, tokenizer
from transformers import StopStringCriteria

from harness.basics.errors import UserError
from harness.config.schema import GenerationConfig
from harness.models.ends import Ends, StopStrings
from harness.verify.recount import problems
from harness.workload.records import Request

STRINGS = ("the", "。", "世", "\n\n", "cat sat", "👍", "é", EOS, "User:", "e", "t on th", "語の", "zzz", "|end", " ")
BROKEN = "\ufffd"


def drawn(rng: random.Random, known: Any) -> list[int]:
    """Returns ids as a model may give them: of a piece of text, or any, some of them of no token at all."""
    ids = known(TEXT).input_ids
    if rng.random() < 0.5:
        begin = rng.randrange(len(ids))
        return list(ids[begin : begin + rng.randint(1, 30)])
    return [rng.choice(ids) if rng.random() < 0.7 else rng.randrange(len(known) + 5) for _ in range(rng.randint(1, 20))]


@cache
def possible(kind: str) -> list[str]:
    """Returns the stop strings that can come."""
    found = []
    for string in STRINGS:
        try:
            StopStrings.of([string], tokenizer(kind))
        except UserError:
            continue
        found.append(string)
    return found


def decoding(known: Any) -> Callable[[list[int]], str]:
    return lambda ids: known.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_with_the_token_with_which_hugging_face_ends(kind: str, scale: Callable[..., int]) -> None:
    rng, known, ended = random.Random(0), tokenizer(kind), 0
    for _ in range(scale(40, 1000, 12)):
        strings = rng.sample(possible(kind), rng.randint(1, 3))
        ours, theirs = StopStrings.of(strings, known), StopStringCriteria(known, strings)
        ends = Ends(frozenset(), strings=ours)
        for _ in range(30):
            ids = drawn(rng, known)
            expected = bool(theirs(torch.tensor([ids]), torch.empty(0))[0])
            assert (ends.reason(ids, len(ids) - 1) == "stop") == expected, (strings, known.convert_ids_to_tokens(ids))
            ended += expected
    assert ended > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_what_stood_before_the_stop_string(kind: str, scale: Callable[..., int]) -> None:
    """Ids are fed one at a time, from some prompt on, as in a run."""
    rng, known, ended, in_prompt = random.Random(1), tokenizer(kind), 0, 0
    decode = decoding(known)
    for _ in range(scale(40, 1000, 12)):
        strings = rng.sample(possible(kind), rng.randint(1, 3))
        ends = Ends(frozenset(), strings=StopStrings.of(strings, known))
        for _ in range(30):
            ids = drawn(rng, known)
            begin = rng.randint(0, min(3, len(ids) - 1))
            place = next((place for place in range(begin, len(ids)) if ends.reason(ids, place)), None)
            if place is None:
                assert ends.text(decode, ids[:begin], ids[begin:]) == decode(ids[begin:])
                continue
            text, whole = ends.text(decode, ids[:begin], ids[begin : place + 1]), decode(ids[begin : place + 1])
            ended += 1
            assert not any(string in text for string in strings)
            # Where the text would show a stop string it ends before that; else it began in the prompt, or is special.
            found = [whole.find(string) for string in strings if string in whole]
            in_prompt += not found
            plain = BROKEN not in whole and not whole.startswith("##")
            if found and plain and not begin and " " not in strings:  # not all tokenizers show a text's first space
                assert text == whole[: min(found)]
            assert whole.startswith(text) or BROKEN in text
    assert ended > 50 and in_prompt


def test_characters_split_over_tokens_are_found_and_their_rest_is_not_shown() -> None:
    known = tokenizer("byte_level")
    single = [known.convert_tokens_to_ids(sign) for sign in map(_letter, "aé世界".encode())]
    ends = Ends(frozenset(), strings=StopStrings.of(["世"], known))
    assert [ends.reason(single, place) for place in range(len(single))].index("stop") == 5
    assert ends.text(decoding(known), [], single[:6]) == "aé"
    assert ends.text(decoding(known), single[:4], single[4:6]) == ""


def _letter(byte: int) -> str:
    """Returns GPT-2's sign for a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()[byte]


def test_a_stop_string_that_ends_in_the_middle_of_a_token_takes_its_rest_along() -> None:
    pieces = {0: b"one tw", 1: b"o thr", 2: b"ee", 3: b"x"}
    ends = Ends(frozenset(), strings=StopStrings(["two", "three"], pieces, 5))

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[token] for token in ids).decode()

    assert [ends.reason([0, 1, 2], place) for place in range(3)] == [None, "stop", "stop"]
    assert ends.text(decode, [], [0, 1]) == "one "
    assert ends.text(decode, [0], [1]) == ""  # it began in the prompt
    assert ends.text(decode, [3], [0, 3]) == "one twx"  # no end: the length ended it


def test_end_of_sequence_comes_first_and_a_stop_id_is_not_in_the_text() -> None:
    pieces = {token: bytes([97 + token]) for token in range(5)}
    ends = Ends(frozenset({2}), frozenset({2, 3}), StopStrings(["ab", "c"], pieces, 2))
    assert [ends.reason([0, token], 1) for token in range(5)] == [None, "stop", "eos", "stop", None]
    assert ends.ids == {2, 3}

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[token] for token in ids).decode()

    assert [ends.text(decode, [], ids) for ids in ([4, 3], [4, 0, 1], [4, 2], [4, 4])] == ["e", "e", "e", "ee"]
    assert Ends(None, frozenset({3})).reason([2], 0) is None
    assert Ends().text(decode, [], []) == ""


def test_a_stop_string_that_no_token_can_end_is_refused() -> None:
    generation = GenerationConfig(stop_strings=["the", "\u0416"])
    with pytest.raises(UserError, match=r"^generation\.stop_strings: '\u0416' has characters that no token of this"):
        Ends.of(frozenset(), generation, tokenizer("words"))
    with pytest.raises(UserError, match=r"^generation\.stop_strings: the vocabulary of object cannot be read as text"):
        Ends.of(frozenset(), generation, object())


PIECES = {token: bytes([97 + token]) for token in range(26)}
AB = Ends(frozenset({25}), frozenset({24}), StopStrings(["ab", "ccc"], PIECES, 3))


@pytest.mark.parametrize(
    ("ids", "reason", "prompt", "ends", "found"),
    [
        ([5, 0, 1], "stop", [3], AB, None),
        ([1], "stop", [3, 0], AB, None),  # it began in the prompt
        ([5, 24], "stop", [3], AB, None),
        ([5, 25], "eos", [3], AB, None),
        ([5, 6, 7], "length", [3], AB, None),
        ([5, 6, 7], "stop", [3], AB, "finished with stop, but with its last token 7 ends none of the stop strings"),
        ([1], "stop", [3], AB, "finished with stop, but with its last token 1 ends none"),
        ([1], "stop", None, AB, None),  # what the prompt ends with is not known
        ([5, 6, 7], "stop", None, AB, "finished with stop, but with its last token 7 ends none"),
        (
            [5, 0, 1],
            "length",
            [3],
            AB,
            "finished with length, but its last token 1 ends a stop string, or is a stop id",
        ),
        ([5, 25], "stop", [3], AB, "finished with stop, but with its last token 25 ends none"),
        ([5, 24], "eos", [3], AB, "finished with eos, but its last token 24 is not one of [25]"),
        ([0, 1, 5], "length", [3], AB, "went on after a stop string, or stop id, with token 1 at position 1"),
        ([24, 5, 6], "length", [3], AB, "went on after a stop string, or stop id, with token 24 at position 0"),
        ([5, 25], "eos", [3], Ends(None, frozenset({24})), None),
        ([5, 6, 7], "stop", [3], Ends(None), "finished with stop, but with its last token 7 ends none"),
        ([5, 6, 7], "stop", [3], None, None),  # stop strings, and no tokenizer at hand to find them with
    ],
)
def test_a_recount_knows_how_a_request_may_end(
    ids: list[int], reason: str, prompt: list[int] | None, ends: Ends | None, found: str | None
) -> None:
    line = {"token_ids": ids, "finish_reason": reason, "prompt_tokens": 1, "output_tokens": len(ids)}
    request = Request(0, "x", 3)
    told = list(problems(line, "eos", ends, request, None, prompt, 26))
    assert [text[: len(found)] for text in told] == [found] if found else told == []


def test_no_stop_string_ends_a_request_that_is_as_long_as_asked() -> None:
    line = {"token_ids": [5, 0, 1], "finish_reason": "stop", "prompt_tokens": 1, "output_tokens": 3}
    assert next(problems(line, "length", Ends())) == "finished with stop, but generation.stop is length"
