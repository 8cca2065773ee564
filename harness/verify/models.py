"""The model that ``--model`` asks: the run's own, or one that must be the same checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.basics.errors import UserError, one_line, quoted
from harness.config.schema import ModelConfig, Weights
from harness.models import loaded, locate
from harness.models.directory import TOKENIZER_FILES
from harness.models.fingerprint import fingerprint
from harness.models.source import Source
from harness.verify.runs import RecordedRun

TRUSTED = ("trust_remote_code", "allow_pickle")  # not for a run's record to decide, which may be anybody's


def find(run: RecordedRun, directory: str, trusted: Collection[str]) -> Source:
    """Returns a run's model.

    Args:
        directory: where it lies now; empty for what the record says.
        trusted: those of :data:`TRUSTED` that the user allows.

    Raises:
        UserError: it is not there, it is another model, or the user does not trust it as the run did.
    """
    model = run.group("model", ModelConfig)
    for name in TRUSTED:
        if getattr(model, name) and name not in trusted:
            remedy = f"if you trust the checkpoint, add --{name.replace('_', '-')}"
            raise UserError("--model", f"{run.run_id} ran with model.{name}=true", remedy)
        setattr(model, name, name in trusted)
    if directory:
        model.path = directory
        if Path(directory).is_file() or any((Path(directory) / name).is_file() for name in TOKENIZER_FILES):
            model.tokenizer = None
    try:
        source = locate.locate(model)
    except UserError as error:
        if error.field.startswith("model.path"):
            raise UserError("--model", error.found, "give the run's model as --model DIR") from error
        raise
    recorded, found = run.record.get("model"), locate.model_name(model, source)
    unknown = not loaded.checkpoints(run.record)  # then the names are all that there is to go by
    if directory and unknown and model.weights is not Weights.dummy and recorded != found and _plain(recorded):
        described = run.setting("model", "name")
        if described in (recorded, found):  # one of the two is the model that conf/model describes, by its sizes
            raise UserError(
                "--model", f"{quoted(directory, 200)} is {found}, the run's model is {recorded}", "give that"
            )
    return source


def refuse_other_checkpoint(runs: Collection[RecordedRun], source: Source, directory: str) -> None:
    """Raises UserError if a run wrote down the fingerprint of another checkpoint than this one."""
    found = fingerprint(source)
    for run in runs:
        known = loaded.checkpoints(run.record)
        if found is not None and known and found not in known:
            place = quoted(directory or source.path or "what the record describes", 200)
            differ = f"its sha256 is {found[:12]}, that of the run's {known[0][:12]}"
            raise UserError(
                "--model", f"{place} is not the checkpoint of {run.run_id}: {differ}", "give that as --model DIR"
            )


def other_name(run: RecordedRun, source: Source, directory: str) -> str | None:
    """Returns what is wrong with the name of the model in a run's record; None where nothing is, or it is not known."""
    model, recorded = run.group("model", ModelConfig), run.record.get("model")
    if directory and not loaded.checkpoints(run.record):
        return None  # find() has seen to it
    found = locate.model_name(model, source)
    names = {found}
    if directory and found != model.name and model.path is not None:  # it was called after the place where it lay
        names.add(os.path.basename(os.path.normpath(model.path)).removesuffix(".gguf"))
    if model.demo:  # runs of before called a checkpoint of the demo model's sizes by its name
        names.add(locate.model_name(replace(model, demo=False), source))
    if recorded in names:
        return None
    return f"record.json says model {one_line(str(recorded), 60)}, the checkpoint is {found}"


def _plain(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
