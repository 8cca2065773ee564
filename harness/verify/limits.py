"""Whether a rejected request could have run: its tokens against the limits of the run, by the engines' arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from harness.engines.base import Engine
from harness.engines.shared.kv_blocks import refusal
from harness.models.architecture import context_length
from harness.verify.runs import RecordedRun
from harness.workload.records import Request

BLOCK_NOTE = re.compile(r"the kernels' KV blocks are of ([0-9]+) tokens")  # FastGenEngine.load()


class Unknown(Exception):
    """A limit is not in the record; says which."""


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
            except Unknown as error:
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
        Unknown: nothing that the record tells refuses it, and it does not tell everything.
    """
    engine, model, parallel = (_section(part, name) for name in ("engine", "model", "parallel"))
    limit = context_length(architecture, None if model.get("max_context") is None else _count(model, "max_context"))
    asked = SimpleNamespace(settings=SimpleNamespace(max_context=limit))
    if reason := Engine.too_long(cast(Engine, asked), prompt_tokens, output_len):
        return reason
    name = engine.get("name")
    if name == "ds_inference" and engine.get("kernel_inject"):
        return _too_wide(engine, prompt_tokens, output_len)
    if name in ("fastgen", "mii"):
        return _too_many_blocks(part, engine, _count(parallel, "dp"), prompt_tokens, output_len)
    return None


def _too_wide(engine: dict[str, Any], prompt_tokens: int, output_len: int) -> str | None:
    """As the engine itself says it; imported here, since it brings torch and DeepSpeed."""
    from harness.engines.ds_inference.engine import DsInferenceEngine

    settings = SimpleNamespace(batch_tokens=_count(engine, "batch_tokens"), batch_size=_count(engine, "batch_size"))
    asked: Any = SimpleNamespace(injected=True, settings=SimpleNamespace(engine=settings))
    asked._width = cast(Any, DsInferenceEngine._width).fget(asked)
    return DsInferenceEngine._too_wide(asked, prompt_tokens, output_len)


def _too_many_blocks(
    part: dict[str, Any], engine: dict[str, Any], dp: int, prompt_tokens: int, output_len: int
) -> str | None:
    statistics = part.get("engine_statistics")
    if not isinstance(statistics, dict) or type(total := statistics.get("kv_blocks")) is not int:
        raise Unknown("how many KV blocks there were is not in the record")
    if engine["name"] == "mii":
        # MII takes the size of a block from its kernels and cannot use the last one.
        raise Unknown("the size of MII's KV blocks is not in the record")
    size = _count(engine, "kv_block_size")
    notes = part.get("notes")
    for note in notes if isinstance(notes, list) else ():
        if match := BLOCK_NOTE.search(str(note)):
            size = int(match[1])
    # The replicas' blocks are in the record as a sum, and one may have had fewer than another.
    return refusal(prompt_tokens, output_len, max(size, 1), total if dp == 1 else total // dp // 2)


def _section(part: dict[str, Any], name: str) -> dict[str, Any]:
    config = part.get("config")
    section = config.get(name) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise Unknown(f"its config has no {name}")
    return section


def _count(section: dict[str, Any], key: str) -> int:
    value = section.get(key)
    if type(value) is not int or value < 1:
        raise Unknown(f"its config has no {key}")
    return value
