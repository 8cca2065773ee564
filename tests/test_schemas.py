"""The JSON Schemas of a run: what real runs leave is as they say, and there is nothing that they do not name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.documents import tables
from support.runs import SIMULATED, TINY, Run, python
from support.schemas import DIRECTORY, schemas, written

from harness.results.columns import COLUMNS
from harness.results.completions import read_completions
from harness.results.table import read_rows

ROOT = DIRECTORY.parents[1]
WORK = [*TINY, "dataset=synthetic", "dataset.num_samples=6", "dataset.output_len=4"]
VALIDATORS = {
    name.partition(".")[0]: jsonschema.Draft202012Validator(json.loads((DIRECTORY / name).read_text()))
    for name in ("record.schema.json", "completion.schema.json", "accuracy.schema.json")
}


def wrong(kind: str, found: Any) -> list[str]:
    """Returns what a schema has against a file, and the members that it does not name."""
    validator = VALIDATORS[kind]
    known = validator.schema["properties"]
    return [error.message for error in validator.iter_errors(found)] + [key for key in found if key not in known]


def records(results: Path) -> list[dict[str, Any]]:
    """Returns the records of all runs, once they and all completions were found to be as the schemas say."""
    found = []
    for row in read_rows(results / "runs.csv"):
        directory = results / row["run_id"]
        found.append(json.loads((directory / "record.json").read_text()))
        assert wrong("record", found[-1]) == []
        assert set(COLUMNS) <= found[-1].keys()
        if (lines := directory / "completions.jsonl").exists():
            assert [problem for line in read_completions(lines) for problem in wrong("completion", line)] == []
    return found


def test_the_files_are_what_the_table_makes_of_them() -> None:
    made = {name: written(schema) for name, schema in schemas().items()}
    shipped = {path.name: path.read_text() for path in DIRECTORY.glob("*.schema.json")}
    assert shipped == made, "PYTHONPATH=.:tests python tests/support/schemas.py writes them anew"


@pytest.mark.parametrize("kind", VALIDATORS)
def test_they_are_schemas(kind: str) -> None:
    VALIDATORS[kind].check_schema(VALIDATORS[kind].schema)


def test_what_the_documents_say_of_a_record_is_in_its_schema() -> None:
    (table,) = (table for heading, table in tables(ROOT / "results" / "README.md") if heading == "The record")
    named = [key.strip("` ") for row in table[1:] for key in row[0].split(",")]
    assert set(named) <= VALIDATORS["record"].schema["properties"].keys()


# --- real runs ---


def test_runs_that_were_ok_stopped_resumed_and_refused(harness: Callable[..., Run], tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert harness(*WORK, *SIMULATED).status == 0
    stopped = harness(*WORK, *SIMULATED, "timeout_s=1", "engine.pace=1000")
    (run_id,) = (row["run_id"] for row in stopped.rows if row["status"] == "timeout")
    records(results)
    assert harness(f"resume={run_id}", "timeout_s=null").status == 0
    assert harness(*WORK, *SIMULATED, "parallel.tp=8").status == 2
    done = records(results)
    assert [record["status"] for record in done] == ["ok", "ok", "invalid"]
    assert len(done[1]["segments"]) == 2


def test_a_run_with_rejected_requests(harness: Callable[..., Run]) -> None:
    run = harness(*WORK, *SIMULATED, "dataset.input_len=40", "dataset.output_len=4", "model.max_context=30")
    assert {line["finish_reason"] for line in run.completions.values()} == {"rejected"}
    records(run.results)


@pytest.mark.slow
def test_measured_runs_and_an_evaluation(harness: Callable[..., Run], tmp_path: Path) -> None:
    for words in (["parallel.dp=2"], ["engine=baseline", "verify=1"], ["engine=ds_inference"]):
        assert harness(*WORK, *words).status == 0
    records(tmp_path / "results")
    done = python("-m", "harness.accuracy", *WORK, f"results_dir={tmp_path / 'scored'}")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "scored").glob("*/accuracy.json")
    assert wrong("accuracy", json.loads(path.read_text())) == []


# --- what they refuse ---

LINE = {
    **{"index": 0, "prompt_tokens": 3, "output_tokens": 2, "finish_reason": "eos", "token_ids": [5, 2], "text": "a"},
    **{"first_token_s": 0.5, "finished_s": 1.5},
}


@pytest.mark.parametrize(
    "change",
    [
        {"index": -1},
        {"output_tokens": 1.5},
        {"finish_reason": "tired"},
        {"token_ids": ["5"]},
        {"finished_s": "1.5"},
        {"finish_reason": "rejected"},
        {"finish_reason": "rejected", "error": "too long"},  # and yet two tokens
        {"text": None},
    ],
)
def test_a_line_that_is_no_completion(change: dict[str, Any]) -> None:
    assert wrong("completion", LINE) == []
    assert wrong("completion", LINE | change) != []
