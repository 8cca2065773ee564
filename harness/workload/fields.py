"""Which fields of a record are the prompt, the output length and the id, by ``dataset.*_field`` or by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig
from harness.workload.records import MAX_LENGTH, Message, Request
from harness.workload.stored_file import Record, StoredFile, describe

SURELY_PROMPTS = ("prompt", "messages")
PROMPTS = (*SURELY_PROMPTS, "text", "question", "instruction", "input")
OUTPUT_LENGTHS = ("output_len", "max_tokens", "max_new_tokens", "max_completion_tokens")
IDS = ("id", "custom_id", "request_id")
PROMPT_LENGTH = "prompt_len"  # the shipped sample's and asc24's; only ever compared
WRITTEN_NUMBER = re.compile(r" *([0-9]{1,9})(?:\.0+)? *")  # pandas writes 64.0 in a column that has gaps
MISSING = object()


def value_at(record: Any, field: str) -> Any:
    """Returns what ``field`` names in a record, or MISSING: a key, or keys and positions in lists joined by dots."""
    if isinstance(record, dict) and field in record:
        return record[field]
    for part in field.split("."):
        if isinstance(record, dict) and part in record:
            record = record[part]
        elif isinstance(record, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(record):
            record = record[int(part[:9])]
        else:
            return MISSING
    return record


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one file that requests are made of.

    Attributes:
        prompt: the field's name.
        output_lengths, ids: the fields that may hold them; a record's is the first that it has.
    """

    prompt: str
    output_lengths: Sequence[str]
    ids: Sequence[str]

    @classmethod
    def asked(cls, dataset: DatasetConfig) -> list[str]:
        """Returns the names that may be looked for in a file."""
        prompts = [dataset.prompt_field] if dataset.prompt_field else PROMPTS
        lengths = [dataset.output_len_field] if dataset.output_len_field else OUTPUT_LENGTHS
        ids = [dataset.id_field] if dataset.id_field else IDS
        return [*prompts, *lengths, *ids, PROMPT_LENGTH]

    @classmethod
    def of(cls, records: Sequence[Record], dataset: DatasetConfig) -> Fields:
        """Returns the fields of a file.

        Raises:
            UserError: a field that was named is nowhere, or which one is the prompt cannot be told.
        """
        values = [record.value for record in records]
        there = list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))
        file = records[0].file
        for key in ("prompt_field", "output_len_field", "id_field"):
            name = getattr(dataset, key)
            if name and all(value_at(value, name) is MISSING for value in values):
                raise UserError(f"dataset.{key}", f"no record has the field {quoted(name)}", _choose(there, file))
        return cls(
            dataset.prompt_field or _prompt_of(there, file),
            [dataset.output_len_field] if dataset.output_len_field else OUTPUT_LENGTHS,
            [dataset.id_field] if dataset.id_field else IDS,
        )

    def request(self, record: Record) -> Request:
        """Returns the request of one record; its ``output_len`` is None where the record has none.

        Raises:
            UserError: a field is missing or holds something else.
        """
        value = value_at(record.value, self.prompt)
        if value is MISSING:
            known = f"an object with a {quoted(self.prompt)}"
            remedy = f"write it as {record.file.record}, or name the field with dataset.prompt_field"
            raise record.error("", f"{describe(record.value)}, not {known}", remedy)
        prompt, messages, reply = "", None, None
        if isinstance(value, list):
            messages, reply = without_reply(record, self.prompt, messages_of(record, self.prompt, value))
            prompt = said(messages)
        else:
            prompt = record.prompt(self.prompt, value)
        return Request(
            record.index,
            prompt,
            self._output_len(record),
            self._claimed(record),
            reply=reply,
            messages=messages,
            id=self._id(record),
        )

    def _first(self, record: Record, names: Sequence[str]) -> tuple[str, Any]:
        """Returns the first of the fields that the record has, and what is in it; None for none."""
        for name in names:
            value = value_at(record.value, name)
            if value is not MISSING and value is not None and not (record.file.written and value == ""):
                return name, value
        return names[0], None

    def _output_len(self, record: Record) -> int | None:
        name, value = self._first(record, self.output_lengths)
        return None if value is None else record.length(name, _number(record, value))

    def _id(self, record: Record) -> str | None:
        name, value = self._first(record, self.ids)
        if value is None or type(value) is int:
            return None if value is None else str(value)
        if isinstance(value, str):
            return record.text(name, value)
        remedy = "correct it, or name another field with dataset.id_field"
        raise record.error(name, f"{describe(value)} is neither text nor a whole number", remedy)

    def _claimed(self, record: Record) -> int | None:
        """Returns the prompt's length in tokens that a record states, if it does."""
        claimed = _number(record, self._first(record, [PROMPT_LENGTH])[1])
        return claimed if type(claimed) is int and 1 <= claimed <= MAX_LENGTH else None


def messages_of(record: Record, field: str, value: Any) -> tuple[Message, ...]:
    """Returns the messages of a chat in OpenAI's form, of text alone; raises UserError."""
    if not isinstance(value, list):
        raise record.error(field, f"{describe(value)} is not a list of messages")
    if not value:
        raise record.error(field, "an empty list")
    return tuple(_message(record, f"{field}[{number}]", one) for number, one in enumerate(value))


def _message(record: Record, field: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise record.error(field, f"{describe(value)} is not an object")
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise record.error(f"{field}.{key}", "calls of tools cannot be asked here", "leave the request out")
    role = record.prompt(f"{field}.role", value.get("role"))
    content = value.get("content")
    if isinstance(content, list):  # parts, of which text alone can be read
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise record.error(f"{field}.content[{number}]", f"{describe(part)} is not a part of type text")
        texts = [record.text(f"{field}.content[{n}].text", part.get("text")) for n, part in enumerate(content)]
        return Message(role, "".join(texts))
    return Message(role, record.text(f"{field}.content", content))


def without_reply(record: Record, field: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """Returns a chat as it is asked, and the answer that a data set of finished chats has at its end."""
    if messages[-1].role != "assistant":
        return messages, None
    if len(messages) == 1:
        raise record.error(field, "an assistant's message alone asks nothing")
    return messages[:-1], messages[-1].content or None


def said(messages: Sequence[Message]) -> str:
    """Returns what the messages of a chat say, for estimates of its length."""
    return "\n".join(message.content for message in messages)


def _prompt_of(there: Sequence[str], file: StoredFile) -> str:
    """Returns which of a file's fields is the prompt; raises UserError where that cannot be told."""
    for name in SURELY_PROMPTS:
        if name in there:
            return name
    found = [name for name in PROMPTS if name in there]
    if not found:
        raise file.error(
            f"no field of a record is called {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}", _choose(there, file)
        )
    if len(found) > 1:
        several = " and ".join(quoted(name) for name in found)
        raise file.error(f"the prompt may be {several}", f"say which: dataset.prompt_field={found[0]}")
    return found[0]


def _choose(there: Sequence[str], file: StoredFile) -> str:
    """Returns how to name a field that is in a file."""
    if not there:
        return f"write its records as {file.record}"
    return f"name one of its fields: {quoted(list(there), 150)}, by dots what lies deeper"


def _number(record: Record, value: Any) -> Any:
    """Returns the whole number that a cell of text is; ``value`` itself where it is none."""
    if record.file.written and isinstance(value, str) and (match := WRITTEN_NUMBER.fullmatch(value)):
        return int(match[1])
    return value
