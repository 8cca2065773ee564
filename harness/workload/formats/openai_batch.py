"""OpenAI's batch files: one line a request to ``/v1/chat/completions`` or ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from harness.basics.errors import quoted
from harness.config.schema import DatasetConfig
from harness.workload.fields import messages_of, said
from harness.workload.formats.base import StoredFormat
from harness.workload.json_file import JsonFile, Layout
from harness.workload.records import Request, Workload
from harness.workload.stored_file import Record, StoredFile, describe

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LENGTHS = ("max_completion_tokens", "max_tokens")
# What would come back another way than it does here, and the values that ask for nothing.
UNABLE = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
}
# What only says how to draw the next token, and the values that draw the likeliest.
SAMPLING = {"temperature": (0,), "top_p": (1,)}


class OpenAiBatch(StoredFormat):
    """Chats and prompts with an id each; plain or gzip.

    Decoding is greedy: a request that asks for sampling is run all the same, and a note says so. What cannot be done
    otherwise (several choices, tools, log-probabilities, ...) is refused.
    """

    name = "openai_batch"
    optional: ClassVar[Sequence[str]] = ("output_len",)
    record = '{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}'
    wanted = "an OpenAI batch file"
    what = "an OpenAI batch"

    def file(self, path: str) -> StoredFile:
        """Returns the file at ``path``, unread."""
        return self.opened(JsonFile, path, layout=Layout.either)

    def recognises(self, value: Any) -> bool:
        """Returns whether ``value`` is an object with an id and a body."""
        return isinstance(value, dict) and "custom_id" in value and isinstance(value.get("body"), dict)

    def requests(self, records: Sequence[Record], dataset: DatasetConfig) -> Iterable[Request | None]:
        """Yields the request of each line; no two may have the same id."""
        seen: dict[str, Record] = {}
        for record in records:
            request = self._request(record)
            assert request.id is not None
            if (first := seen.setdefault(request.id, record)) is not record:
                raise record.error("custom_id", f"{quoted(request.id)} is that of {first.place} too")
            yield request

    def _request(self, record: Record) -> Request:
        if not self.recognises(record.value):
            raise record.misshapen()
        line = record.value
        name = record.prompt("custom_id", line["custom_id"])
        if line.get("method", "POST") != "POST":
            raise record.error("method", f"{describe(line['method'])} is not the string 'POST'")
        body, url = line["body"], line.get("url")
        if url not in (CHATS, COMPLETIONS):
            raise record.error("url", f"{describe(url)} is neither {CHATS} nor {COMPLETIONS}")
        for key, nothing in UNABLE.items():
            if (value := body.get(key)) is not None and value not in nothing:
                raise record.error(f"body.{key}", f"{describe(value)} cannot be done here", "leave it out")
        output_len = next(
            (record.length(f"body.{key}", body[key]) for key in LENGTHS if body.get(key) is not None), None
        )
        if url == CHATS:
            messages = messages_of(record, "body.messages", body.get("messages"))
            return Request(record.index, said(messages), output_len, messages=messages, id=name)
        return Request(record.index, record.prompt("body.prompt", body.get("prompt")), output_len, id=name)

    def completed(self, workload: Workload, records: Sequence[Record]) -> Workload:
        """Returns the workload with its stop strings, and a note where requests ask for sampling."""
        bodies = [record.value["body"] for record in records]
        notes = []
        for key, greedy in SAMPLING.items():
            values = [body[key] for body in bodies if body.get(key) is not None and body[key] not in greedy]
            if values:
                asked = f"{len(values):,} of {len(bodies):,} requests of the file ask for {key}={quoted(values[0])}"
                notes.append(f"{asked}: decoding is greedy all the same")
        return replace(workload, notes=tuple(notes), stop_strings=_stop_strings(records))


def _stop_strings(records: Sequence[Record]) -> tuple[str, ...] | None:
    """Returns the stop strings of all requests, None for none; raises UserError where they differ."""
    found: list[tuple[str, ...]] = []
    for record in records:
        stop = record.value["body"].get("stop")
        strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not isinstance(strings, list):
            raise record.error("body.stop", f"{describe(stop)} is neither a string nor a list of them")
        found.append(tuple(record.prompt("body.stop", one) for one in strings))
        if sorted(found[-1]) != sorted(found[0]):
            other = f"{describe(stop)}, but {records[0].place} has {quoted(list(found[0]))}"
            raise record.error("body.stop", other, "a run has one rule for all requests: split the file")
    return found[0] or None


FORMAT = OpenAiBatch()
