"""The tokens of a text, or how many they are, where no model is loaded: by a tokenizer file alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.basics.cache import cache_root
from harness.basics.errors import UserError, one_line
from harness.config.schema import ModelConfig
from harness.models import demo
from harness.models.source import Source

FILE = "tokenizer.json"

Counter = Callable[[Sequence[str]], list[int]]
Encoder = Callable[[Sequence[str]], list[list[int]]]


def place_of(model: ModelConfig, source: Source) -> str | None:
    """Returns where a model's tokenizer lies; nothing is fetched, the demo model's is taken where it is there."""
    if source.tokenizer is None and model.path is None and model.demo and demo.complete(cache_root() / demo.NAME):
        return str(cache_root() / demo.NAME)
    return source.tokenizer


def counter(model: ModelConfig, source: Source) -> Counter | None:
    """Returns what counts tokens as the model's tokenizer would, special tokens among them; None without its file.

    Nothing is fetched: the demo model counts where it is in the cache already.

    Raises:
        UserError: the file is there and cannot be read.
    """
    tokenizer = _tokenizer(model, source)
    if tokenizer is None:
        return None
    return lambda texts: [len(encoded) for encoded in tokenizer.encode_batch(list(texts))]


def encoder(model: ModelConfig, source: Source) -> Encoder | None:
    """Returns what gives the ids themselves; otherwise as :func:`counter`."""
    tokenizer = _tokenizer(model, source)
    if tokenizer is None:
        return None
    return lambda texts: [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]


def _tokenizer(model: ModelConfig, source: Source) -> Any:
    place = place_of(model, source)
    if place is None or not (file := Path(place) / FILE).is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError("model.tokenizer", f"{file}: {one_line(str(error), 200)}", "copy the file again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
