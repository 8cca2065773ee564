"""tracking.py: what MLflow gets of a run, and that nothing which goes wrong there is the run's."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.made_runs import FACTS
from support.runs import SIMULATED, TINY, Run

from harness.basics.errors import UserError
from harness.config.schema import TrackingConfig
from harness.results.directory import read_record
from harness.results.recorder import RunRecorder
from harness.results.table import read_rows
from harness.running import resume, tracking
from harness.workload.records import Completion

CONFIG = {"engine": {"name": "fastgen", "token_budget": 512}, "model": {"architecture": {"odd key!": [1, 2]}}}


def closed(results: Path, run_id: str = "one", status: str = "ok", **figures: Any) -> RunRecorder:
    """Returns a run that has just been closed."""
    recorder = RunRecorder.create(results, run_id, CONFIG, ["harness/main.py"])
    recorder.add(Completion(0, 60, 40, "length", [1], "x", 0.5, 1.5))
    recorder.finish(
        status, None if status == "ok" else "why", elapsed_s=2.0, time={"prefill_s": 1.5}, **FACTS, **figures
    )
    return recorder


def sent(recorder: RunRecorder, uri: str | None = None, experiment: str = "some runs") -> str:
    line = tracking.send(TrackingConfig("mlflow", uri, experiment), recorder)
    assert line is not None
    return line


def runs(directory: Path, experiment: str = "some runs") -> list[Any]:
    """Returns MLflow's runs in a directory, and their artifacts by name."""
    from mlflow.tracking import MlflowClient

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # as the harness sets it for itself
    client = MlflowClient(tracking_uri=str(directory))
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def test_a_run_is_told_of(tmp_path: Path) -> None:
    results = tmp_path / "results # 1"
    recorder = closed(results)
    line = sent(recorder)
    (run,) = runs(results / "mlflow")
    assert run.info.run_id in line and (run.info.status, run.info.run_name) == ("FINISHED", "one")
    assert run.data.params["engine.token_budget"] == "512"
    assert run.data.params["model.architecture.odd key_"] == "[1, 2]"
    assert run.data.metrics["total_tokens_per_s"] == 50.0 and run.data.metrics["time.prefill_s"] == 1.5
    assert "energy_j" not in run.data.metrics  # unknown is not 0
    assert run.data.tags["run_id"] == "one" and run.data.tags["device_name"] == "A CPU"
    assert run.data.tags["mlflow.source.git.commit"] == FACTS["git_commit"]
    (record,) = results.glob("mlflow/*/*/artifacts/record.json")
    assert json.loads(record.read_text())["total_tokens"] == 100
    kept = read_record(results, "one") or {}
    assert (kept["status"], kept["tracking"]["run_id"]) == ("ok", run.info.run_id)
    assert len(read_rows(results / "runs.csv")) == 1


@pytest.mark.parametrize(("status", "theirs"), [("failed", "FAILED"), ("oom", "FAILED"), ("interrupted", "KILLED")])
def test_a_run_that_was_not_ok_is_told_of_as_such(tmp_path: Path, status: str, theirs: str) -> None:
    sent(closed(tmp_path, status=status))
    (run,) = runs(tmp_path / "mlflow")
    assert (run.info.status, run.data.tags["status"], run.data.tags["error"]) == (theirs, status, "why")


def test_a_run_that_is_resumed_stays_one(tmp_path: Path) -> None:
    recorder = closed(tmp_path, status="failed")
    sent(recorder)
    recorder.amend("ok", None, total_tokens_per_s=70.0, config=CONFIG | {"timeout_s": 1})
    sent(recorder)
    sent(closed(tmp_path, "another"))
    run = next(run for run in runs(tmp_path / "mlflow") if run.info.run_name == "one")
    assert len(runs(tmp_path / "mlflow")) == 2
    assert (run.info.status, run.data.metrics["total_tokens_per_s"]) == ("FINISHED", 70.0)
    assert run.data.params["timeout_s"] == "1"


def test_a_server_that_is_away_costs_a_note(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    row = read_rows(closed(tmp_path).results_dir / "runs.csv")
    recorder = closed(tmp_path, "two")
    line = sent(recorder, f"http://127.0.0.1:{port}")
    record = read_record(tmp_path, "two") or {}
    assert record["status"] == "ok" and record["notes"] == [line] and "not tracked" in line
    assert read_rows(tmp_path / "runs.csv")[:1] == row


def test_a_server_that_says_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LIMIT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        line = sent(closed(tmp_path), f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "no answer within 0 s" in line
    assert (read_record(tmp_path, "one") or {})["status"] == "ok"


def test_results_that_are_gone_cost_nothing_more(tmp_path: Path) -> None:
    recorder = closed(tmp_path / "results")
    (tmp_path / "results" / "one").rename(tmp_path / "moved")
    assert "not tracked" in sent(recorder, str(tmp_path / "mlflow"))


def test_none_sends_nothing(tmp_path: Path) -> None:
    assert tracking.send(TrackingConfig(), closed(tmp_path)) is None
    assert not (tmp_path / "mlflow").exists()


# --- what is refused before a run ---


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (TrackingConfig(uri="x"), "tracking.uri: 'x' means nothing with tracking=none; add"),
        (TrackingConfig(experiment="x"), "tracking.experiment: 'x' means nothing"),
        (TrackingConfig("wandb"), "tracking.name: 'wandb'; choose"),
        (TrackingConfig("mlflow", "http://"), "tracking.uri: 'http://'; give a directory"),
        (TrackingConfig("mlflow", "http://host:x"), "tracking.uri: 'http://host:x'; give"),
        (TrackingConfig("mlflow", "http://me:secret@host"), "tracking.uri: has a user's name or password in it"),
        (TrackingConfig("mlflow", "/dev/null/x"), "tracking.uri: '/dev/null/x' cannot be written"),
        (TrackingConfig("mlflow", None, " "), "tracking.experiment: ' '; give a name"),
    ],
)
def test_what_cannot_be_tracked_is_refused(config: TrackingConfig, line: str) -> None:
    with pytest.raises(UserError) as refused:
        tracking.check(config, "results")
    assert str(refused.value).startswith(line) and "secret" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlflow is not installed; pip install mlflow-skinny"):
        tracking.check(TrackingConfig("mlflow"), "results")


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.place(TrackingConfig("mlflow"), "results") == "http://server:5000"
    assert tracking.place(TrackingConfig("mlflow", "here"), "results") == str(Path("here").absolute())


def test_a_run_is_resumed_with_its_own_config_and_tracked_as_asked() -> None:
    typed = OmegaConf.create({"tracking": {"name": "mlflow"}, "timeout_s": 5})
    config = OmegaConf.create({"tracking": {"name": "none"}, "timeout_s": None})
    assert resume._apply(["resume=RUN", "tracking=mlflow", "timeout_s=5"], config, typed)
    assert (config.tracking.name, config.timeout_s) == ("mlflow", 5)


# --- whole runs ---


@pytest.mark.slow
def test_a_run_tracks_itself(harness: Callable[..., Run]) -> None:
    work = [*TINY, *SIMULATED, "dataset=synthetic", "dataset.num_samples=4", "dataset.output_len=4"]
    run = harness(*work, "tracking=mlflow", "tracking.experiment=mine", PYTHONPATH="")
    (tracked,) = runs(run.results / "mlflow", "mine")
    assert run.status == 0 and f"run {tracked.info.run_id}" in " ".join(run.stdout.split())  # wrapped
    assert tracked.data.metrics["total_tokens"] == float(run.row["total_tokens"])
    assert run.record["config_hash"] == harness(*work, results=run.results / "untracked").record["config_hash"]
    late = ["tracking=mlflow", "timeout_s=0.5", "engine.pace=1e6"]
    stopped = harness(*work, *late, results=run.results / "stopped", PYTHONPATH="")
    (tracked,) = runs(stopped.results / "mlflow", "llama-harness")
    assert (stopped.status, tracked.info.status, tracked.data.tags["status"]) == (1, "FAILED", "timeout")
