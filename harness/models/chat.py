"""Chats as a model was trained on them: its own template, found from headers alone, applied by transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from harness.basics.errors import UserError, one_line
from harness.config.schema import ModelConfig
from harness.models.gguf import metadata
from harness.models.source import Source
from harness.models.token_counts import place_of

FILES = ("chat_template.jinja", "chat_template.json")
GGUF_KEY = "tokenizer.chat_template"
# Some templates write today's date. A job is the same job tomorrow, so the day is always that which Llama 3's
# template falls back to, spelled for the format that a template asks for.
DAY = {"%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%-m": "7", "%Y": "2024", "%y": "24"}
CLOCK = {"%a": "Fri", "%A": "Friday", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}
TODAY = "strftime_now"


class Message(Protocol):
    """One message of a chat."""

    @property
    def role(self) -> str:
        """Who speaks."""

    @property
    def content(self) -> str:
        """What is said."""


def tokenizer_of(model: ModelConfig, source: Source) -> Source:
    """Returns the source with the tokenizer whose template is meant: of a model that is only described the demo's."""
    return source if source.kind == "dummy" else replace(source, tokenizer=place_of(model, source))


def has_template(model: ModelConfig, source: Source) -> bool | None:
    """Returns whether the tokenizer of a model brings a chat template; None for a hub id that is not on this machine.

    Raises:
        UserError: its config is broken.
    """
    place = tokenizer_of(model, source).tokenizer
    if place is None:
        return False
    if place.endswith(".gguf"):
        return bool(metadata(Path(place)).get(GGUF_KEY))
    directory = Path(place)
    if not directory.is_dir():
        return None
    if any((directory / name).is_file() for name in FILES):
        return True
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError) as error:
        found = f"{directory / 'tokenizer_config.json'} cannot be read ({one_line(str(error), 100)})"
        raise UserError("model.tokenizer", found, "copy the file again") from error
    return isinstance(config, dict) and bool(config.get("chat_template"))


def check(model: ModelConfig, source: Source) -> None:
    """Raises UserError for a model that certainly has no chat template."""
    if has_template(model, source) is False:
        place = tokenizer_of(model, source).tokenizer
        found = f"no chat template in {place}" if place is not None else f"{model.name} has no tokenizer here"
        remedy = "leave it out, or give model.tokenizer=DIR of the instruct model"
        raise UserError("dataset.chat_template", found, remedy)


def rendered(tokenizer: Any, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Returns the prompt ids of chats, up to where the model's answer begins; no BOS but the template's own.

    Args:
        tokenizer: of transformers, with a template.

    Raises:
        UserError: there is no template after all, or it refuses a chat.
    """
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        found = f"the tokenizer brings no template ({one_line(str(error), 100)})"
        raise UserError("dataset.chat_template", found, "leave it out, or use an instruct model") from error
    if TODAY in template:
        template = _fixed_day() + template
    texts = []
    for number, chat in enumerate(chats):
        messages = [{"role": message.role, "content": message.content} for message in chat]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(message.role for message in chat[:4]) + (", ..." if len(chat) > 4 else "")
            found = f"request {number} ({roles}) is refused by the model's template ({one_line(str(error), 150)})"
            raise UserError("dataset.chat_template", found, "change its messages, or dataset.system_prompt") from error
        texts.append(text)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    if [] in ids:
        found = f"the model's template makes nothing of request {ids.index([])}"
        raise UserError("dataset.chat_template", found, "leave it out, or use another model")
    return ids


def _fixed_day() -> str:
    """Returns Jinja that stands for the function by which templates ask for the day."""
    spelled = "".join(f" | replace('{code}', '{text}')" for code, text in (DAY | CLOCK).items())
    return f"{{%- macro {TODAY}(format) %}}{{{{ format{spelled} }}}}{{% endmacro %}}\n"
