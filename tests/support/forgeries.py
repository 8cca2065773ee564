"""Finished runs made to say what did not happen: each edit is carried through all sums, rates and rows.

And what is found in them. Shared by the tests of forged runs and ``check_mutations.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.results.columns import COLUMNS
from harness.results.completions import Tally, read_completions
from harness.results.passes import pass_figures
from harness.results.table import put_row
from harness.verify import __main__ as verify

Record = dict[str, Any]
Lines = list[dict[str, Any]]
SLOWER = 0.9  # the clock that is claimed, over the one that ran
EXTRA = 50  # tokens claimed of each prompt that it has not
GPU = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Forgery:
    """What somebody does to a finished run, and which checks must notice.

    Attributes:
        change: edits the record and the lines of the run in this directory; sums, rates and row are made to fit.
        found: how what is found begins, of one finding at least.
    """

    name: str
    change: Callable[[Path, Record, Lines], None]
    found: str
    caught_by: tuple[str, ...] = ("recount", "against", "model")


def forge(directory: Path, change: Callable[[Path, Record, Lines], None]) -> None:
    """Changes a run, and everything in it that follows from what was changed."""
    lines = read_completions(directory / "completions.jsonl")
    record = json.loads((directory / "record.json").read_text())
    change(directory, record, lines)
    (directory / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record |= Tally.of_file(directory / "completions.jsonl").figures(record["elapsed_s"])
    record["passes"] = pass_figures(directory / "passes.csv")
    (directory / "record.json").write_text(json.dumps(record, indent=2))
    put_row(directory.parent, {name: record.get(name) for name in COLUMNS})


def findings(report: dict[str, Any]) -> list[str]:
    """Returns what is wrong, of all runs of a report of ``python -m harness.verify --json``."""
    return [one["found"] for run in report["runs"] for one in run["findings"]]


def found_in(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Returns what ``python -m harness.verify`` finds wrong in a run."""
    capsys.readouterr()
    verify.main([str(directory), "--json", *words])
    return findings(json.loads(capsys.readouterr().out))


def table(path: Path, change: Callable[[dict[str, str]], None], rows: slice = slice(None)) -> None:
    """Changes rows of a CSV file that quotes nothing."""
    header, *cells = [line.split(",") for line in path.read_text().splitlines()]
    found = [dict(zip(header, each, strict=True)) for each in cells]
    for row in found[rows]:
        change(row)
    path.write_text("".join(",".join(each) + "\n" for each in (header, *(row.values() for row in found))))


def feed(directory: Path, record: Record, tokens: int) -> None:
    """Has the last pass say that it held so many more tokens, or so many fewer."""

    def change(row: dict[str, str]) -> None:
        for name in ("tokens", "prompt_tokens"):
            row[name] = str(int(row[name]) + tokens)

    table(directory / "passes.csv", change, slice(-1, None))
    steps = record["engine_statistics"]["steps"]
    record["engine_statistics"]["mean_tokens_per_pass"] += tokens / steps


def reject(directory: Path, record: Record, lines: Lines) -> None:
    """The request that costs the most was rejected."""
    line = max((line for line in lines if line["token_ids"]), key=lambda line: line["prompt_tokens"])
    feed(directory, record, 1 - line["prompt_tokens"] - len(line["token_ids"]))
    error = f"prompt of {line['prompt_tokens']} tokens + output_len 8 exceeds the model's context of 64"
    line |= {"prompt_tokens": 0, "output_tokens": 0, "finish_reason": "rejected", "token_ids": [], "text": ""}
    line |= {"first_token_s": None, "error": error}


def faster(directory: Path, record: Record, lines: Lines) -> None:
    """All that the record, the row and the completions have from the clock is a tenth less."""
    for line in lines:
        for name in ("first_token_s", "finished_s"):
            if line[name] is not None:
                line[name] *= SLOWER
    for part in (record, *record.get("segments", ())):
        for name in ("elapsed_s", "clock_from_s", "clock_to_s"):
            if part.get(name) is not None:
                part[name] *= SLOWER
        part["time"] = {name: seconds * SLOWER for name, seconds in part.get("time", {}).items()}


def other_model(directory: Path, record: Record, lines: Lines) -> None:
    """The model was a larger one."""
    record["model"] = "llama2_70b"


def other_dtype(directory: Path, record: Record, lines: Lines) -> None:
    """It was computed in the type that needs more."""
    record["dtype"] = "float32" if record["dtype"] != "float32" else "bfloat16"


def other_device(directory: Path, record: Record, lines: Lines) -> None:
    """It ran on the GPU that everybody would like to have."""
    for part in (record, record["environment"]):
        part |= {"device": "cuda", "device_name": GPU}


def longer_prompts(directory: Path, record: Record, lines: Lines) -> None:
    """Every prompt was longer, and its tokens were fed."""
    done = [line for line in lines if line["finish_reason"] != "rejected"]
    for line in done:
        line["prompt_tokens"] += EXTRA
    feed(directory, record, EXTRA * len(done))


def lower_cap(directory: Path, record: Record, lines: Lines) -> None:
    """The outputs end early, and the run says that they were meant to."""
    cap, left_out = 4, 0
    for line in lines:
        if len(line["token_ids"]) > cap:
            left_out += len(line["token_ids"]) - cap
            line |= {"token_ids": line["token_ids"][:cap], "output_tokens": cap, "finish_reason": "length"}
    feed(directory, record, -left_out)
    record["config"]["generation"]["max_output_len"] = cap
    record["notes"] = [f"generation.max_output_len={cap} caps output_len"]


FORGERIES = (
    Forgery("forges a rejection", reject, "rejected, but its prompt of "),
    Forgery("forges the clock", faster, "passes.csv, step "),
    Forgery("forges the model's name", other_model, "record.json says model llama2_70b, "),
    Forgery("forges the type", other_dtype, "record.json says dtype "),
    Forgery("forges the device", other_device, "record.json says device_name NVIDIA H100 80GB HBM3, its section "),
    Forgery("forges longer prompts", longer_prompts, "prompt_tokens is "),
    Forgery("forges a cap on outputs", lower_cap, "record.json says generation.max_output_len=4 in its config, "),
)
