"""Runs lm-evaluation-harness tasks over an engine, from local files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.accuracy.pool import Pool
from harness.basics.errors import UserError, one_line

# Read where these libraries are first imported: what is not on this machine is not fetched.
OFFLINE = ("HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
PACKAGE = "lm-eval"


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Which tasks, as on the command line."""

    names: Sequence[str]
    include_path: str | None
    limit: int | None
    num_fewshot: int | None


def check(options: TaskOptions) -> None:
    """Raises UserError where the tasks cannot run, before a model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks", f"{PACKAGE} is not installed", "pip install 'lm-eval>=0.4.13,<0.5'")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError("--include-path", f"{options.include_path} is not a directory", "give one with task files")
    manager = _manager(options.include_path)
    missing = [name for name in options.names if not manager.match_tasks([name])]
    if missing:
        remedy = "see lm_eval ls tasks" + ("" if options.include_path else ", or give --include-path")
        raise UserError("--tasks", f"there is no task {', '.join(missing)}", remedy)


def _manager(include_path: str | None) -> Any:
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def version() -> str:
    """Returns the installed version of lm-evaluation-harness."""
    return importlib.metadata.version(PACKAGE)


def run(pool: Pool, options: TaskOptions) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Returns the tasks' figures by name, a line for each answered question, and notes.

    The figures of a task: ``version``, ``n_shot``, ``samples``, ``metrics`` by name, ``scores`` (those from 0 to 1 in
    which higher is better), ``subtask`` (whether it is part of a group that is there too), ``hash`` of its questions.

    Raises:
        UserError: a task's data is not on this machine, or asks what the engines do not do.
    """
    manager = _manager(options.include_path)
    import lm_eval

    from harness.accuracy.lm_eval_adapter import HarnessLM

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = HarnessLM(pool)
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(options.names),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            log_samples=True,
        )
    except (ConnectionError, FileNotFoundError) as error:
        found = one_line(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            "--tasks", found, "a task's data must be on this machine: data_files of the task's YAML"
        ) from error
    notes = []
    if model.truncated:
        notes.append(f"{model.truncated} contexts were cut on the left to fit the model's context")
    lines = [_line(name, sample) for name, samples in found["samples"].items() for sample in samples]
    return figures(found), lines, notes


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's results as the record has them; see :func:`run`."""
    inner = {task for tasks in found["group_subtasks"].values() for task in tasks}
    tasks = {}
    for name, result in found["results"].items():
        better = found["higher_is_better"].get(name) or {}
        metrics = {key: value for key, value in result.items() if "," in key and isinstance(value, int | float)}
        kept = {key: value for key, value in metrics.items() if "_stderr," not in key}
        if not kept:
            continue  # a group that sums up nothing
        tasks[name] = {
            "version": found["versions"].get(name),
            "n_shot": found["n-shot"].get(name),
            "samples": (found["n-samples"].get(name) or {}).get("effective", result.get("sample_len")),
            "metrics": kept,
            "stderr": {key.replace("_stderr,", ","): value for key, value in metrics.items() if "_stderr," in key},
            "scores": [key for key, value in kept.items() if better.get(key.split(",")[0]) and 0 <= value <= 1],
            "subtask": name in inner,
            "hash": _fingerprint(found["samples"][name]) if name in found["samples"] else None,
        }
    return tasks


def _fingerprint(samples: list[dict[str, Any]]) -> str:
    """Returns 16 hex digits that are equal where the same questions were asked in the same words."""
    facts = sorted([s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _line(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Returns what is kept of an answer: the question stays in its file."""
    kept = ("doc_id", "target", "filtered_resps", "filter", *sample.get("metrics", ()))
    return {"task": task, **{key: sample[key] for key in kept if key in sample}}
