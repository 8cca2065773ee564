"""``openai_batch_output.jsonl``: a run's completions as OpenAI's batch interface gives them back."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.basics.files import json_bytes, replace
from harness.results.completions import read_completions
from harness.workload.records import Request

OUTPUT = "openai_batch_output.jsonl"
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


def write(directory: Path, record: dict[str, Any], requests: Sequence[Request], chats: bool) -> Path:
    """Writes a line for each request that came back, in the order of the dataset; returns the file.

    Args:
        directory: the run's, with its ``completions.jsonl``.
        record: the run's.
        requests: as they were run; one without an id is called by its index.
        chats: whether they were asked as chats, by the model's template.

    Raises:
        UserError: the completions cannot be read, or the file cannot be written.
    """
    path = directory / OUTPUT
    by_index = {entry["index"]: entry for entry in read_completions(directory / "completions.jsonl")}
    done = [request for request in requests if request.index in by_index]
    lines = [_line(record, request, by_index[request.index], chats) for request in done]
    replace(path, b"".join(json_bytes(line) + b"\n" for line in lines))
    return path


def check_ids(requests: Sequence[Request]) -> None:
    """Raises UserError where two requests would be called the same: whoever reads the file tells them by their ids."""
    seen: dict[str, int] = {}
    for request in requests:
        name = _custom_id(request)
        if (first := seen.setdefault(name, request.index)) != request.index:
            found = f"openai_batch, but requests {first} and {request.index} have the same id, {quoted(name)}"
            raise UserError("export", found, "give each its own, or name another field with dataset.id_field")


def _custom_id(request: Request) -> str:
    return f"request-{request.index}" if request.id is None else request.id


def _line(record: dict[str, Any], request: Request, completion: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Returns one line; a rejected request has no response but an error."""
    name = f"{record['run_id']}-{request.index}"
    line: dict[str, Any] = {
        "id": f"batch_req_{name}",
        "custom_id": _custom_id(request),
        "response": None,
        "error": None,
    }
    if completion["finish_reason"] == "rejected":
        return line | {"error": {"code": "rejected", "message": completion.get("error")}}
    body = _body(record, request, completion, chat)
    return line | {"response": {"status_code": 200, "request_id": f"req_{name}", "body": body}}


def _body(record: dict[str, Any], request: Request, completion: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Returns what ``/v1/chat/completions`` or ``/v1/completions`` would answer."""
    text = completion["text"]
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    prompt_tokens, output_tokens = completion["prompt_tokens"], completion["output_tokens"]
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{record['run_id']}-{request.index}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(datetime.datetime.fromisoformat(record["started_at"]).timestamp()),
        "model": record["model"],
        "choices": [
            {"index": 0, **content, "logprobs": None, "finish_reason": FINISH_REASONS[completion["finish_reason"]]}
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
