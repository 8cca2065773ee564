"""Runs for the tests of ``compare``, made as the harness makes them, without a model."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.compare import __main__ as compare
from harness.compare.comparison import Comparison
from harness.compare.comparison import compare as compared
from harness.compare.reading import load
from harness.results.recorder import RunRecorder
from harness.workload.records import Completion
from support.runs import python

ROOT = Path(__file__).resolve().parent.parent.parent
FACTS = {
    "kernels": "torch",
    "dtype": "float32",
    "dataset_sha256": "aa" * 32,
    "requests": 2,
    "device": "cpu",
    "device_name": "A CPU",
    "token_budget": 512,
    "max_sequences": 64,
    "peak_memory_bytes": 2**31,
    "git_commit": "c0ffee" * 6 + "c0ff",
}


def run(
    results: Path, name: str, rate: float | None = 100.0, status: str = "ok", error: str = "", **changes: Any
) -> str:
    """Makes a run as the harness does; ``changes`` are keys of the config (with dots) or facts of the run."""
    config: dict[str, Any] = {
        "engine": {"name": "fastgen", "token_budget": 512, "order": "dataset", "quantization": None, "kernels": "auto"},
        "model": {"name": "small", "weights": "pretrained", "dtype": "auto", "path": None},
        "dataset": {"name": "sample", "num_samples": None, "output_len": None},
        "generation": {"stop": "eos", "max_output_len": None},
        "parallel": {"tp": 1, "dp": 1},
        "results_dir": str(results),
        "repeat": 1,
        "timeout_s": None,
    }
    facts = dict(FACTS)
    for key, value in changes.items():
        group, dot, entry = key.partition(".")
        if dot:
            config[group][entry] = value
        elif key in config:
            config[key] = value
        else:
            facts[key] = value
    if "engine.token_budget" in changes:
        facts["token_budget"] = changes["engine.token_budget"]
    if "model.dtype" in changes:
        facts["dtype"] = changes["model.dtype"]
    asked = [f"{key}={value}" for key, value in changes.items() if "." in key or key in config]
    recorder = RunRecorder.create(results, name, config, ["harness/main.py", *asked])
    if status == "ok":
        recorder.add(Completion(0, 60, 40, "length", [1], "x", 0.5, 1.5))
        recorder.add(Completion(1, 70, 30, "length", [1], "x", 0.5, 2.5))
        recorder.finish("ok", **({"elapsed_s": 200 / rate} if rate else {}), **facts)
    else:
        recorder.finish(status, error or None, **(facts if changes.get("late") else {}))
    return name


def comparison(*tables: Path, **options: Any) -> Comparison:
    """Returns what ``compare`` makes of tables that give no reason for a warning."""
    warnings: list[str] = []
    found = compared(load([str(table) for table in tables], warnings.append), **options)
    assert warnings == []
    return found


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would."""
    return python("-m", "harness.compare", *arguments, cwd=cwd, PYTHONPATH=str(ROOT))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line with which the command refuses its arguments."""
    assert compare.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), captured.err
    return errors[0]
