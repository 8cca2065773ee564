"""Keys of other tools that greedy decoding has no place for, or that have another name here, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

from harness.basics.errors import UserError, one_line

GREEDY = "decoding is greedy, the challenge's rule"
# What only says how to draw the next token, and the values with which nothing is drawn.
SAMPLING: Mapping[str, tuple[float, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, 1, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "do_sample": (False,),
    "num_beams": (1,),
    "beam_width": (1,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1, 0),
    "no_repeat_ngram_size": (0,),
    "logit_bias": (),
    "logprobs": (False, 0),
}
ONLY_THERE = ("seed", "n")  # words of other groups too
# What has another name here.
RENAMED = {
    **dict.fromkeys(
        ("stop_string", "stop_words", "stop_word", "stop_sequences", "stop_sequence", "stops", "until"),
        "generation.stop_strings=['...']",
    ),
    **dict.fromkeys(
        ("eos_token_id", "eos_token_ids", "stop_token_id", "stop_ids", "stop_tokens", "stop_token"),
        "generation.stop_token_ids=[ID]",
    ),
    **dict.fromkeys(
        ("max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens", "max_length"),
        "generation.max_output_len=N, a cap on what the dataset asks for",
    ),
    **dict.fromkeys(("ignore_eos", "min_tokens", "min_new_tokens"), "generation.stop=length, for exactly output_len"),
}
GROUPS = ("", "generation", "engine", "model", "dataset")


def refusal(key: str, value: str | None) -> UserError | None:
    """Returns the refusal of such a key; None where it is none.

    Args:
        key: dotted, with its group or without.
        value: as typed; None where it is not known.
    """
    group, _, name = key.lstrip("+").rpartition(".")
    if group not in GROUPS:
        return None
    if name in RENAMED:
        return UserError(key, "no such key", f"use {RENAMED[name]}")
    if name not in SAMPLING and not (group == "generation" and name in ONLY_THERE):
        return None
    found = GREEDY if value is None else f"{one_line(value, 40)}: {GREEDY}"
    if value is not None and _number(value) in SAMPLING.get(name, ()):
        return UserError(key, f"{found} anyway", "leave it out")
    return UserError(key, f"{found}, and nothing is drawn", "leave it out")


def _number(value: str) -> float | None:
    words = {"true": 1.0, "false": 0.0}
    try:
        return words[value.lower()] if value.lower() in words else float(value)
    except ValueError:
        return None
