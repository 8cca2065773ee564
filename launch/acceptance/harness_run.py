"""Runs of the harness as a stage starts them: as a user does, within a time limit, and judged by ``harness.verify``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acceptance.commands import Ended, Running, Steps, command_steps, started, together
from acceptance.findings import Figure, Outcome
from acceptance.stage import Stage
from harness.results.completions import read_completions
from harness.results.directory import read_record
from harness.results.table import read_rows


@dataclass(frozen=True)
class HarnessRun(Ended):
    """A run of the harness and what it left behind.

    Attributes:
        row: its row of ``runs.csv``; None if it has none, as one that was refused before it began.
        record: its ``record.json``; empty if it has none.
        directory: its own; None if it made none.
    """

    row: dict[str, str] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.status == 0 and self.row is not None and self.row["status"] == "ok"

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """The generated ids of each finished request, by its index; empty while there is none."""
        if self.directory is None or not (self.directory / "completions.jsonl").exists():
            return {}
        return {line["index"]: line["token_ids"] for line in read_completions(self.directory / "completions.jsonl")}

    def figure(self, column: str) -> float | None:
        """Returns a number of its row; None where it is empty."""
        text = (self.row or {}).get(column, "")
        return float(text) if text else None


def harness_steps(
    stage: Stage,
    name: str,
    *overrides: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    tick: Callable[[Running], None] | None = None,
) -> Steps[HarnessRun]:
    """Runs the harness to its end, or ends it, with the results of all stages in one table.

    Args:
        name: names its log in the stage's folder.
        overrides: of the config, without ``results_dir``.
        timeout_s: seconds; where the stage itself has less left, its end comes first, and it is to go on later.
        env: further environment variables.
        tick: called several times a second, to disturb the run.
    """
    running = harness_started(stage, name, *overrides, timeout_s=timeout_s, env=env)
    running.tick = tick
    return left_behind(stage, running, (yield running))


def harness_run(
    stage: Stage, name: str, *overrides: str, timeout_s: float, env: Mapping[str, str] | None = None
) -> HarnessRun:
    """Does :func:`harness_steps` at once."""
    return together([harness_steps(stage, name, *overrides, timeout_s=timeout_s, env=env)], 1)[0]


def harness_started(
    stage: Stage, name: str, *overrides: str, timeout_s: float, env: Mapping[str, str] | None = None
) -> Running:
    """Starts a run and returns at once, for a stage that disturbs it; :func:`left_behind` has what came of it."""
    words = ["harness/main.py", *overrides, f"results_dir={stage.results}"]
    return started(stage, name, words, timeout_s, env, _records(stage))


def left_behind(stage: Stage, running: Running, ended: Ended) -> HarnessRun:
    """Returns a run that has ended, with what it left behind."""
    directory = directory_of(stage, running)
    if directory is None:
        return HarnessRun(**vars(ended))
    table = stage.results / "runs.csv"
    rows = read_rows(table) if table.exists() else []
    row = next((row for row in rows if row["run_id"] == directory.name), None)
    record = read_record(stage.results, directory.name) or {}
    return HarnessRun(**vars(ended), row=row, record=record, directory=directory)


def directory_of(stage: Stage, running: Running) -> Path | None:
    """Returns the directory of a run, or of the one that it resumes; None while it has none."""
    resumed = [word.removeprefix("resume=") for word in running.words if word.startswith("resume=")]
    if resumed:
        return stage.results / resumed[0]
    for path in sorted(set(_records(stage)) - running.before):
        record = read_record(stage.results, path.parent.name) or {}
        launcher = record.get("launcher") or [None, None]  # of several ranks: the record's process is rank 0
        if running.process.pid in (record.get("pid"), launcher[1]):
            return path.parent
    return None


def _records(stage: Stage) -> set[Path]:
    return set(stage.results.glob("*/record.json"))


@dataclass
class Verdict:
    """What a finding says of a run.

    Attributes:
        wrong: requests whose tokens ``verify`` finds wrong.
    """

    outcome: Outcome
    detail: str
    figures: dict[str, Figure]
    wrong: list[int] = field(default_factory=list)

    def report(self, stage: Stage, name: str) -> None:
        """Reports it as the finding ``name``."""
        stage.report(name, self.outcome, self.detail, **self.figures)


def judge(
    stage: Stage, name: str, run: HarnessRun, model: bool = True, timeout_s: float = 300.0, **figures: Figure
) -> None:
    """Reports a run as the finding ``name``: what ended it, or else whether ``harness.verify`` finds its tokens right.

    Args:
        model: ask Hugging Face's model of every token, not only recount.
        figures: further ones of the finding.
    """
    found = verdict(stage, name, run, model, timeout_s)
    found.figures |= figures
    found.report(stage, name)


def verdict(stage: Stage, name: str, run: HarnessRun, model: bool = True, timeout_s: float = 300.0) -> Verdict:
    """Does :func:`verdict_steps` at once."""
    return together([verdict_steps(stage, name, run, model, timeout_s)], 1)[0]


def verdict_steps(
    stage: Stage, name: str, run: HarnessRun, model: bool = True, timeout_s: float = 300.0
) -> Steps[Verdict]:
    """Returns what :func:`judge` reports."""
    figures = figures_of(run)
    if not run.ok or run.directory is None:
        return Verdict(Outcome.refused if run.refused else Outcome.failed, run.how, figures)
    words = ["-m", "harness.verify", str(run.directory), *(["--model"] if model else []), "--json"]
    checked = yield from command_steps(stage, f"verify {name}", words, timeout_s)
    if checked.status not in (0, 1) or checked.timed_out:
        return Verdict(Outcome.refused if checked.refused else Outcome.failed, f"verify: {checked.how}", figures)
    found = json.loads(checked.stdout)
    outcome = Outcome.passed if checked.status == 0 else Outcome.failed
    return Verdict(outcome, found["verdict"], figures, found["wrong"])


def figures_of(run: HarnessRun) -> dict[str, Figure]:
    """Returns of a run what every table of stages shows: who computed it, how fast, in how much memory."""
    names = ("run_id", "kernels", "dtype", "total_tokens_per_s", "output_tokens_per_s", "elapsed_s", "load_s")
    found: dict[str, Figure] = {"run_s": round(run.seconds, 1)}
    for name in (*names, "warmup_s", "peak_memory_bytes", "model_flops_utilisation", "energy_j"):
        text = (run.row or {}).get(name, "")
        if text:
            found[name] = text if name in ("run_id", "kernels", "dtype") else float(text)
    return found
