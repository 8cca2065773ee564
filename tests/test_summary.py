"""What a finished run prints: on a pipe without blanks at the ends of lines, of a resumed run what is known of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.runs import ROOT

from harness.basics.terminal import console
from harness.results.columns import COLUMNS
from harness.results.summary import summary

RECORD = json.loads((ROOT / "results/reference/sample/20261123-221840-fastgen-7ef4/record.json").read_text())
PLACES = {"directory": "results/a", "results_dir": "results"}
KILLED: dict[str, Any] = {"elapsed_s": 3.0}  # it could not write down what it had done
WHOLE = {name: RECORD[name] for name in ("elapsed_s", "time", "engine_statistics")}


def lines(capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """Returns what the summary of a run says, in one line of single blanks."""
    record = RECORD | PLACES | changes
    summary(console(), {name: record.get(name) for name in COLUMNS}, record)
    out = capsys.readouterr().out
    assert all(line == line.rstrip() for line in out.split("\n"))
    return " ".join(out.split())


def test_a_run_of_one_segment(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys)
    assert "Time prefill 66.2%, decode 33.4%, tokenize 0.1%, detokenize 0.0%, host 0.3% Passes 256 passes of 60" in said
    assert "12% of the token budget 512; at most 64 sequences, KV cache 4.9% full at its peak, 0 preemptions" in said


def test_a_segment_that_was_killed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    which = "(of segment 2 of 2 alone: the other ended before writing this down)"
    said = lines(capsys, segments=[KILLED, WHOLE], time={})
    assert f"Time prefill 66.2%, decode 33.4%, tokenize 0.1%, detokenize 0.0%, host 0.3% {which}" in said
    assert f"0 preemptions {which}" in said
    said = lines(capsys, segments=[KILLED, WHOLE, KILLED, WHOLE], time={})
    assert said.count("(of segments 2, 4 of 4 alone: the others ended before writing this down)") == 2


def test_segments_that_wrote_theirs_are_taken_together(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"time": {"prefill_s": 1.0, "decode_s": 3.0, "host_s": 0.0}, "elapsed_s": 4.0}
    two = {"time": {"prefill_s": 5.0, "decode_s": 0.0, "host_s": 1.0}, "elapsed_s": 6.0}
    statistics = {"steps": 10, "mean_tokens_per_pass": 20.0, "peak_sequences": 3, "kv_peak_utilisation": 0.5}
    more = {"steps": 30, "mean_tokens_per_pass": 40.0, "peak_sequences": 2, "kv_peak_utilisation": 0.25}
    first = one | {"engine_statistics": statistics | {"preemptions": 1}}
    second = two | {"engine_statistics": more | {"preemptions": 2}}
    passes = "Passes 40 passes of 35 tokens on average, 7% of the token budget 512; at most 3 sequences"
    said = lines(capsys, segments=[first, second])
    assert "Time prefill 60.0%, decode 30.0%, host 10.0% Passes" in said
    assert f"{passes}, KV cache 50.0% full at its peak, 3 preemptions Outside" in said
    second["changed"] = {"engine.token_budget": [256, 512]}
    assert passes.replace(", 7% of the token budget 512", "") in lines(capsys, segments=[first, second])
