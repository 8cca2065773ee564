"""The keys of ``conf/dataset``, checked against what the chosen format takes."""

from __future__ import annotations

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig, SyntheticPrompt
from harness.workload import catalogue, lengths, recognition
from harness.workload.formats.base import Format
from harness.workload.records import MAX_LENGTH


def check(dataset: DatasetConfig, chosen: Format) -> None:
    """Raises UserError for a key that the format needs and lacks, or cannot use."""
    option = f"dataset={chosen.name}"
    if chosen.takes("path"):
        if not dataset.path:
            raise UserError("dataset.path", f"not given with {option}", f"give the path of {chosen.wanted}")
    elif dataset.path is not None:
        known = recognition.option_of(dataset.path)
        fitting = f"this is {known.what}: use dataset={known.option}" if known else ""
        raise UserError(
            "dataset.path",
            f"{quoted(dataset.path, 300)} given with {option}, which reads no file of yours",
            fitting or f"leave it out, or use {catalogue.taking('path')} to run your own file",
        )
    _check_range("dataset.num_samples", dataset.num_samples, chosen.max_samples, "num_samples" in chosen.required)
    for key, value in (("input_len", dataset.input_len), ("output_len", dataset.output_len)):
        if value is None:
            if key in chosen.required:
                raise UserError(f"dataset.{key}", "not given", lengths.NUMBER)
            continue
        if not chosen.takes(key):
            limit = ", or limit the outputs with generation.max_output_len" if key == "output_len" else ""
            found = f"{value} given with {option}, which brings its own lengths"
            raise UserError(f"dataset.{key}", found, f"leave it out{limit}")
        lengths.parse(f"dataset.{key}", value)
    if dataset.prompt is not SyntheticPrompt.hi and not chosen.takes("prompt"):
        found = f"{dataset.prompt.value} given with {option}, which brings its own prompts"
        raise UserError("dataset.prompt", found, f"leave it out, or use {catalogue.taking('prompt')}")
    for key in ("prompt_field", "output_len_field", "id_field", "split"):
        value = getattr(dataset, key)
        if value is not None and not chosen.takes(key):
            found = f"{quoted(value)} given with {option}, which has none to choose"
            raise UserError(f"dataset.{key}", found, f"leave it out, or use {catalogue.taking(key)}")
        if value == "":
            raise UserError(f"dataset.{key}", "the text is empty", "give a name, or null")
    _check_prefix(dataset, chosen)
    _check_turns(dataset, chosen)


def _check_turns(dataset: DatasetConfig, chosen: Format) -> None:
    """Raises UserError for an order or a template that made-up prompts have no use for."""
    for key in ("shuffle", "chat_template", "system_prompt"):
        value = getattr(dataset, key)
        if value not in (False, None) and not chosen.takes(key):
            said = "true" if value is True else quoted(value)
            found = f"{said} given with dataset={chosen.name}, whose prompts are made up"
            raise UserError(f"dataset.{key}", found, "leave it out, or give a file of prompts")
    if dataset.system_prompt is not None and not dataset.chat_template:
        found = f"{quoted(dataset.system_prompt)} given, but prompts are fed as they are"
        raise UserError("dataset.system_prompt", found, "add dataset.chat_template=true")
    if dataset.system_prompt is not None and not _is_text(dataset.system_prompt):
        raise UserError("dataset.system_prompt", quoted(dataset.system_prompt), "give a text, or null")


def _is_text(text: str) -> bool:
    """Returns whether there is something in a text, and it can be encoded."""
    return bool(text) and not any("\ud800" <= character <= "\udfff" for character in text)


def _check_prefix(dataset: DatasetConfig, chosen: Format) -> None:
    """Raises UserError for a beginning that prompts cannot share."""
    if not 0 <= dataset.shared_prefix <= MAX_LENGTH:
        found = f"{dataset.shared_prefix} is out of range"
        raise UserError("dataset.shared_prefix", found, f"give a whole number from 0 to {MAX_LENGTH:,}")
    if dataset.shared_prefix and not chosen.takes("shared_prefix"):
        found = f"{dataset.shared_prefix} given with dataset={chosen.name}, which brings its own prompts"
        raise UserError("dataset.shared_prefix", found, f"leave it out, or use {catalogue.taking('shared_prefix')}")
    if dataset.shared_prefix and dataset.prompt is not SyntheticPrompt.random:
        found = f"{dataset.shared_prefix} given with dataset.prompt={dataset.prompt.value}, which draws nothing"
        raise UserError("dataset.shared_prefix", found, "use dataset.prompt=random")
    if not 1 <= dataset.prefixes <= MAX_LENGTH:
        found = f"{dataset.prefixes} is out of range"
        raise UserError("dataset.prefixes", found, lengths.NUMBER)
    if dataset.prefixes > 1 and not dataset.shared_prefix:
        found = f"{dataset.prefixes} beginnings without a length"
        raise UserError("dataset.prefixes", found, "give dataset.shared_prefix, in tokens")


def _check_range(field: str, value: int | None, limit: int | None, required: bool) -> None:
    if (value is None and required) or (value is not None and not 1 <= value <= (limit or value)):
        found = "not given" if value is None else f"{value} is out of range"
        remedy = "give a whole number from 1" + (f" to {limit:,}" if limit else "")
        raise UserError(field, found, remedy + ("" if required else ", or null"))
