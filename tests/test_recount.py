"""``launch/recount.py``: a real run adds up; the same run with something changed does not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import SAMPLE, Run, python


def recounted(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("launch/recount.py", *map(str, arguments))


@pytest.mark.slow
def test_a_run_adds_up_until_it_is_changed(harness: Callable[..., Run], demo_model: Path) -> None:
    run = harness("dataset.num_samples=5", "generation.max_output_len=3")
    assert run.status == 0, run.stderr
    words = (run.directory, SAMPLE, demo_model / "tokenizer.json")
    done = recounted(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 lines for 5 requests, each index once" in done.stdout
    assert f"total_tokens {int(run.row['total_tokens']):,}\n" in done.stdout

    path = run.directory / "completions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[0])
    for changed, found in (
        (lines[1:], "1 requests are missing"),
        ([*lines, lines[0]], "1 requests are twice"),
        ([json.dumps(entry | {"prompt_tokens": entry["prompt_tokens"] + 1}) + "\n", *lines[1:]], "says ("),
        ([json.dumps(entry | {"token_ids": entry["token_ids"][1:]}) + "\n", *lines[1:]], "output tokens, counted"),
    ):
        path.write_text("".join(changed))
        done = recounted(*words)
        assert done.returncode == 1 and found in done.stdout, done.stdout
    path.write_text("".join(lines))
    table = run.results / "runs.csv"
    table.write_text(table.read_text().replace(f",{run.row['total_tokens']},", ",7,"))
    assert "runs.csv says total_tokens 7" in recounted(*words).stdout

    path.write_text("5\n")
    assert recounted(*words).returncode == 2
    assert recounted("nowhere", SAMPLE, words[2]).stderr == "error: nowhere/record.json: No such file or directory\n"
    assert recounted().returncode == 2
