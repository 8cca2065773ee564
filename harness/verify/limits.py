"""Whether a rejected request could have run: its tokens against the limits of the run, by the engines' arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from harness.engines import catalogue
from harness.engines.base import Engine
from harness.engines.room import Unrecorded, count, section
from harness.models.architecture import context_length
from harness.verify.runs import RecordedRun
from harness.workload.records import Request


def check(
    run: RecordedRun, requests: dict[int, Request], prompts: dict[int, list[int]], architecture: dict[str, Any]
) -> tuple[list[tuple[int, str]], list[str]]:
    """Returns, by index, what is wrong with a run's rejections, and what could not be checked.

    Args:
        requests: by index, ``output_len`` settled.
        prompts: each prompt's ids.
        architecture: of the run's model.

    Raises:
        UserError: ``model.max_context`` of the run's config is none.
    """
    found, unknown = [], []
    for line in run.completions:
        index = line["index"]
        if line["finish_reason"] != "rejected" or index not in requests or index not in prompts:
            continue
        prompt_tokens, output_len = len(prompts[index]), requests[index].output_len or 0
        refused, why = False, None
        for part in _parts(run.record):
            try:
                refused = refused or _refusal(part, architecture, prompt_tokens, output_len) is not None
            except Unrecorded as error:
                why = str(error)
        if why is not None and not refused:
            unknown.append(why)
        elif not refused:
            tokens = f"its prompt of {prompt_tokens} tokens + output_len {output_len}"
            found.append((index, f"rejected, but {tokens} is within all limits of the run"))
    count = f"{len(unknown)} rejected request{'s' if len(unknown) > 1 else ''}"
    return found, [f"whether {count} could have run was not checked: {unknown[0]}"] if unknown else []


def _parts(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what had limits of its own: the segments of a resumed run, or the run itself."""
    parts = record.get("segments")
    yield from [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) and parts else [record]


def _refusal(part: dict[str, Any], architecture: dict[str, Any], prompt_tokens: int, output_len: int) -> str | None:
    """Returns why the engine had to refuse a request; None when it had room for it.

    Raises:
        Unrecorded: nothing that the record tells refuses it, and it does not tell everything.
    """
    model = section(part, "model")
    limit = context_length(architecture, None if model.get("max_context") is None else count(model, "max_context"))
    asked = SimpleNamespace(settings=SimpleNamespace(max_context=limit))
    if reason := Engine.too_long(cast(Any, asked), prompt_tokens, output_len):
        return reason
    return catalogue.of_record(section(part, "engine").get("name")).refusal(part, prompt_tokens, output_len)
