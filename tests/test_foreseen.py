"""running.foreseen: how long a run like those that were fitted takes, and the display that says so at first."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.passes import SECTION, fitted

from harness.basics.errors import UserError
from harness.config.compose import compose
from harness.config.schema import HardwareConfig
from harness.engines import catalogue
from harness.engines.base import Progress
from harness.engines.shared.kv_blocks import KvPool
from harness.running import foreseen
from harness.running import job as jobs
from harness.running.job import Job
from harness.running.progress import Display

WORDS = ["model.weights=dummy", "model.dtype=float32", "dataset=synthetic", "dataset.input_len=100"]
WORDS += ["dataset.output_len=40", "generation.stop=length", "parallel.tp=1", "parallel.dp=1"]

BASE: dict[str, Any] = {
    "limits": {"token_budget": 256, "max_sequences": 64},
    "kernels": "native",
    "settings": SimpleNamespace(host_ranks=1, lookahead=256),
    "kv_pool": KvPool(2000, 64),
    "arrange": list,
}


def job(requests: int, hardware: HardwareConfig) -> Job:
    catalogue.register()
    made = jobs.prepare(compose([*WORDS, f"dataset.num_samples={requests}"]))
    return replace(made, config=replace(made.config, hardware=hardware))


def engine(**changes: Any) -> Any:
    """Returns what is asked of an engine that has loaded."""
    return SimpleNamespace(**{**BASE, **changes})


def test_a_run_within_the_fit_is_foreseen() -> None:
    few, many = job(100, fitted()), job(1000, fitted())
    short = foreseen.elapsed_s(few, engine(), few.workload)
    long = foreseen.elapsed_s(many, engine(), many.workload)  # of which every other request is simulated
    assert short is not None and long is not None
    assert 8 * short < long < 11 * short
    # 100 requests of 100 + 39 tokens at the rate of the known factors: products alone take 6.6 ms a token.
    assert 100 * 139 * 6.5e-3 < short < 4 * 100 * 139 * 6.5e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": {"token_budget": 4096, "max_sequences": 64}},
        {"kernels": "torch"},
        {"limits": {}},
        {"settings": SimpleNamespace(host_ranks=3, lookahead=4)},
    ],
)
def test_a_run_outside_of_it_is_not(changes: dict[str, Any]) -> None:
    one = job(20, fitted())
    assert foreseen.elapsed_s(one, engine(**changes), one.workload) is None


def test_without_a_fit_nothing_is_foreseen() -> None:
    one = job(20, replace(fitted(), fit={}))
    assert foreseen.elapsed_s(one, engine(), one.workload) is None
    other = job(20, fitted(sizes={**SECTION["sizes"], "layers": 31}))
    assert foreseen.elapsed_s(other, engine(), other.workload) is None


def test_a_run_with_a_fit_that_is_none_is_refused() -> None:
    catalogue.register()
    with pytest.raises(UserError, match=r"hardware\.fit\.sizes: missing"):
        jobs.prepare(compose([*WORDS, "dataset.num_samples=4", "+hardware.fit.model=small"]))


def test_the_fit_s_error_is_that_of_runs_which_it_had_not_seen() -> None:
    errors = {"runs": {"a": 0.01}, "left_out": {"a": 0.02, "b": -0.07}}
    assert foreseen.fit_error(job(4, fitted(errors=errors))) == 0.07
    assert foreseen.fit_error(job(4, fitted(errors={"runs": {"a": -0.01}, "left_out": {}}))) == 0.01
    assert foreseen.fit_error(job(4, fitted())) is None
    for wrong in (5, {"runs": {"a": "much"}}, {"left_out": [1]}):
        with pytest.raises(UserError, match=r"hardware\.fit\.errors"):
            jobs.check(job(4, fitted(errors=wrong)).config, "cpu")


@pytest.mark.parametrize(("before", "said"), [(0, True), (1, False)])
def test_the_display_says_it_until_the_pace_is_known(before: int, said: bool) -> None:
    screen = Console(file=io.StringIO(), width=200)
    with Display(screen, {0: 100, 1: 100}, before, foreseen_s=1000.0) as display:
        display.drawn = -1e9
        display.update(Progress(1, 1, 0.1, 0, 0))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert ("left" in shown) == said and "requests" in shown
