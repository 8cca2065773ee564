"""A run's prompts, tokenized again with what lies on this machine: nothing is downloaded, none of its code is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.basics import cache
from harness.basics.errors import UserError, quoted
from harness.config.schema import ModelConfig, Weights
from harness.models import demo, loaded, locate
from harness.models.fingerprint import fingerprint
from harness.models.source import Source
from harness.models.tokenizer import load_tokenizer
from harness.verify.runs import RecordedRun
from harness.workload.records import Request

REMEDY = "--model DIR checks them"


def at_hand(run: RecordedRun) -> tuple[Source, Any]:
    """Returns a run's model, as far as its headers tell, and its tokenizer.

    Raises:
        UserError: they are not at hand on this machine, or not as they were.
    """
    model = run.group("model", ModelConfig)
    if model.trust_remote_code:
        raise UserError("tokenizer", f"{run.run_id} ran with model.trust_remote_code=true", REMEDY)
    if model.path is None and model.weights is not Weights.dummy and model.demo:
        directory = cache.cache_root() / demo.NAME
        if not demo.complete(directory):
            raise UserError("tokenizer", f"the demo model is not in {directory}", REMEDY)
        model.path = str(directory)
    for path in (model.path, model.tokenizer):
        if path is not None and not _exists(path):
            raise UserError("tokenizer", f"{quoted(path, 200)} is not on this machine", REMEDY)
    source = locate.locate(model)
    known = loaded.checkpoints(run.record)
    if known and fingerprint(source) not in known:
        raise UserError("tokenizer", f"{source.path or 'the model'} is not the checkpoint that ran", REMEDY)
    return source, load_tokenizer(source)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no such user in ~user, or a NUL
        return False


def tokenized(requests: dict[int, Request], tokenizer: Any) -> dict[int, list[int]]:
    """Returns the ids of each request's prompt, by index; prompts that came as ids stay what they are."""
    texts = [request.prompt for request in requests.values() if request.prompt_ids is None]
    encoded = iter(tokenizer(texts).input_ids if texts else [])
    return {i: next(encoded) if r.prompt_ids is None else list(r.prompt_ids) for i, r in requests.items()}


def lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Returns how many tokens each text has."""
    return [len(ids) for ids in tokenizer(list(texts)).input_ids]
