"""Finished runs as ``verify`` reads them: the record, the rows of ``runs.csv``, the completions, the requests."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from harness.basics.errors import UserError, one_line, quoted
from harness.config.schema import DatasetConfig, DType, GenerationConfig, ModelConfig, Stop, SyntheticPrompt, Weights
from harness.models.architecture import context_length
from harness.results.completions import read_completions
from harness.results.table import read_rows
from harness.workload import reading
from harness.workload.records import Request, Workload

Group = TypeVar("Group", DatasetConfig, GenerationConfig, ModelConfig)
ENUMS: dict[str, type[Enum]] = {"prompt": SyntheticPrompt, "stop": Stop, "weights": Weights, "dtype": DType}


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run directory.

    Attributes:
        rows: its rows in the ``runs.csv`` beside it, by column; None where there is no such table.
        completions: the lines of ``completions.jsonl``, in order of finishing, rejected requests among them.
    """

    directory: Path
    record: dict[str, Any]
    rows: list[dict[str, str]] | None
    completions: list[dict[str, Any]]

    @property
    def run_id(self) -> str:
        """Its name, on one line."""
        return one_line(str(self.record.get("run_id") or self.directory.name), 120)

    @property
    def ok(self) -> bool:
        """Whether the run says that every accepted request completed."""
        return self.record.get("status") == "ok"

    def setting(self, group: str, key: str) -> Any:
        """Returns a value of the run's config as plain data; None where it has none."""
        config = self.record.get("config")
        section = config.get(group) if isinstance(config, dict) else None
        return section.get(key) if isinstance(section, dict) else None

    def engine_settings(self, key: str) -> list[Any]:
        """Returns a value of ``engine`` as plain data, of each segment of the run; None where one has none."""
        segments = self.record.get("segments")
        parts = [part for part in segments if isinstance(part, dict)] if isinstance(segments, list) else []
        configs = [part.get("config") for part in parts or [self.record]]
        engines = [config.get("engine") if isinstance(config, dict) else None for config in configs]
        return [engine.get(key) if isinstance(engine, dict) else None for engine in engines]

    def group(self, name: str, kind: type[Group]) -> Group:
        """Returns one group of the run's config, typed.

        Raises:
            UserError: the record has no such group, or one that is not of this harness.
        """
        config = self.record.get("config")
        section = config.get(name) if isinstance(config, dict) else None
        known = {field.name for field in dataclasses.fields(kind)}
        try:
            if not isinstance(section, dict):
                raise ValueError(f"no {name}")
            values: dict[str, Any] = {
                key: ENUMS[key](value) if key in ENUMS else value for key, value in section.items() if key in known
            }
            typed = kind(**values)
            _check_lists(typed)
            return typed
        except (TypeError, ValueError) as error:
            found = f"its config is not one of this harness ({one_line(str(error), 100)})"
            raise UserError(str(self.directory / "record.json"), found, "name another run") from error


def _check_lists(found: object) -> None:
    """Raises ValueError for a list of something else: a record may be anybody's."""
    for name, kind in (("stop_strings", str), ("stop_token_ids", int)):
        value = getattr(found, name, [])
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise ValueError(f"{name} is no list of them")


def find(name: str, results: str) -> Path:
    """Returns the directory of a run.

    Args:
        name: the path of a run's directory, a run id, or a part of one that no other run has.
        results: where the runs are, for the latter two.

    Raises:
        UserError: there is no such run, or several.
    """
    if name and (Path(name) / "record.json").is_file():
        return Path(name)
    if os.sep in name:
        raise UserError("run", f"{quoted(name, 200)} is no run's directory: no record.json in it", "name a run id")
    try:
        runs = sorted(entry.name for entry in Path(results).iterdir() if (entry / "record.json").is_file())
    except OSError as error:
        found = f"{quoted(results, 200)} cannot be read: {error.strerror}"
        raise UserError("--results", found, "name the directory that runs were written to") from error
    matches = [name] if name in runs else [run_id for run_id in runs if name and name in run_id]
    if not matches:
        near = difflib.get_close_matches(name, runs[-1000:], n=3, cutoff=0.5)
        remedy = f"near: {', '.join(near)}" if near else "take one from runs.csv, or name another --results"
        raise UserError("run", f"no run id in {quoted(results, 200)} has {quoted(name)} in it", remedy)
    if len(matches) > 1:
        more = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
        raise UserError("run", f"{quoted(name)} is in {', '.join(matches[:3])}{more}", "give more of the run id")
    return Path(results) / matches[0]


def load(directory: Path) -> RecordedRun:
    """Reads a run.

    Raises:
        UserError: its record or its completions are missing or damaged.
    """
    path = directory / "record.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "check this path") from error
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("status"), str):
        raise UserError(str(path), "is damaged: no record of a run", "name another run")
    completions = directory / "completions.jsonl"
    if not completions.exists():
        why = one_line(str(record.get("error") or "it finished no request"), 200)
        raise UserError(str(completions), f"there is none: the run is {record['status']} ({why})", "name another run")
    found = read_completions(completions)
    for number, line in enumerate(found, start=1):
        ids = line.get("token_ids")
        if type(line.get("index")) is not int or not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise UserError(f"{completions}, line {number}", "is not a completion", "the file was edited or damaged")
    table = directory.absolute().parent / "runs.csv"
    rows = None
    if table.is_file():
        rows = [row for row in read_rows(table) if row.get("run_id") == str(record.get("run_id"))]
    return RecordedRun(directory, record, rows, found)


@dataclass(frozen=True, slots=True)
class Requests:
    """What a run was asked for, read again from its dataset.

    Attributes:
        by_index: every request, ``output_len`` settled; None where that cannot be known.
        unknown: why it is not known, for the user.
    """

    by_index: dict[int, Request] | None
    unknown: str | None = None


def read_requests(
    run: RecordedRun,
    file: str | None = None,
    *,
    vocab_size: int | None = None,
    count_tokens: reading.CountTokens | None = None,
    render: reading.Render | None = None,
    architecture: dict[str, Any] | None = None,
    needed: bool = False,
) -> Requests:
    """Reads a run's requests again, as its config names them.

    Args:
        file: where the dataset lies now; None for the path in the record.
        vocab_size, count_tokens, render: what random prompts, texts that give lengths, and chats need; without them
            those stay unknown.
        architecture: of the model, to whose context drawn lengths were cut.
        needed: refuse what otherwise leaves the requests unknown.

    Raises:
        UserError: ``file`` was given or the requests are needed, and they cannot be read or are others than the run's.
    """
    dataset = run.group("dataset", DatasetConfig)
    generation = run.group("generation", GenerationConfig)
    if file is not None:
        dataset.path = file
    try:
        work = reading.read(dataset)
        recorded = run.record.get("dataset_sha256")
        if work.sha256 is not None and work.sha256 != recorded:
            found = f"{quoted(work.path, 200)} is not the file of run {run.run_id}"
            digests = f"sha256 {work.sha256[:12]}, the run's was {str(recorded)[:12]}"
            raise UserError("dataset", f"{found}: {digests}", "give the file it ran with as --dataset FILE")
    except UserError as error:
        if not needed and file is None:
            return Requests(None, str(error))
        remedy = "give the run's dataset as --dataset FILE"
        raise error if "--dataset" in error.remedy else UserError(error.field, error.found, remedy) from error
    if dataset.prompt is SyntheticPrompt.random and vocab_size is None:
        # The ids are not needed for the lengths: the prompts are as long as asked for.
        vocab_size = 1
    if why := _unknown(work, architecture, count_tokens, render):
        return Requests(None, why)
    resolved = reading.resolve(
        work,
        generation,
        vocab_size=vocab_size,
        count_tokens=count_tokens,
        render=render,
        max_context=context_length(architecture or {}, run.setting("model", "max_context")),
    )
    return Requests({request.index: request for request in resolved.requests})


def _unknown(
    work: Workload,
    architecture: dict[str, Any] | None,
    count_tokens: reading.CountTokens | None,
    render: reading.Render | None,
) -> str | None:
    """Returns what cannot be known of the requests without the model's tokenizer and context."""
    if count_tokens is None and any(one.output_len is None or one.like is not None for one in work.requests):
        return "the output lengths are those of replies, which only a tokenizer can count"
    if render is None and any(one.messages is not None for one in work.requests):
        return "the prompts are chats, which only the model's template can write"
    if architecture is None and any(one.drawn for one in work.requests):
        return "the lengths were drawn within the model's context, which is not known"
    return None
