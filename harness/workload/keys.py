"""The keys of ``conf/dataset``, checked against what the chosen format takes."""

from __future__ import annotations

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig, SyntheticPrompt
from harness.workload import catalogue
from harness.workload.formats.base import Format
from harness.workload.records import MAX_LENGTH


def check(dataset: DatasetConfig, chosen: Format) -> None:
    """Raises UserError for a key that the format needs and lacks, or cannot use."""
    option = f"dataset={chosen.name}"
    if chosen.takes("path"):
        if not dataset.path:
            raise UserError("dataset.path", f"not given with {option}", f"give the path of {chosen.wanted}")
    elif dataset.path is not None:
        raise UserError(
            "dataset.path",
            f"{quoted(dataset.path, 300)} given with {option}, which reads no file of yours",
            f"leave it out, or use {catalogue.taking('path')} to run your own file",
        )
    _check_range("dataset.num_samples", dataset.num_samples, chosen.max_samples, "num_samples" in chosen.required)
    for key, value in (("input_len", dataset.input_len), ("output_len", dataset.output_len)):
        if value is not None and not chosen.takes(key):
            limit = ", or limit the outputs with generation.max_output_len" if key == "output_len" else ""
            found = f"{value} given with {option}, which brings its own lengths"
            raise UserError(f"dataset.{key}", found, f"leave it out{limit}")
        _check_range(f"dataset.{key}", value, MAX_LENGTH, key in chosen.required)
    if dataset.prompt is not SyntheticPrompt.hi and not chosen.takes("prompt"):
        found = f"{dataset.prompt.value} given with {option}, which brings its own prompts"
        raise UserError("dataset.prompt", found, f"leave it out, or use {catalogue.taking('prompt')}")


def _check_range(field: str, value: int | None, limit: int | None, required: bool) -> None:
    if (value is None and required) or (value is not None and not 1 <= value <= (limit or value)):
        found = "not given" if value is None else f"{value} is out of range"
        remedy = "give a whole number from 1" + (f" to {limit:,}" if limit else "")
        raise UserError(field, found, remedy + ("" if required else ", or null"))
