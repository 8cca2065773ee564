"""How OpenMP's threads wait: what a run sets before the first library reads it, and what it leaves to the user."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import RANDOM, TINY, Run, ran

from harness.machine.openmp import SPIN_TURNS, wait_briefly

JOB = [*TINY, *RANDOM, "dataset.num_samples=2", "dataset.input_len=8", "dataset.output_len=4"]


@pytest.mark.parametrize(
    ("user", "spins"),
    [
        ({}, str(SPIN_TURNS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_the_user_s_choice_stands(monkeypatch: pytest.MonkeyPatch, user: dict[str, str], spins: str | None) -> None:
    monkeypatch.setattr(os, "environ", dict(user))
    wait_briefly()
    wait_briefly()
    assert dict(os.environ) == user | ({} if spins is None else {"GOMP_SPINCOUNT": spins})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_says_so_before_openmp_is_loaded(tmp_path: Path, ranks: int) -> None:
    run = ran(tmp_path, *JOB, f"parallel.dp={ranks}", cold=True, OMP_DISPLAY_ENV="verbose")
    assert run.status == 0, run.stderr
    said = (run.stdout + run.stderr).count(f"GOMP_SPINCOUNT = '{SPIN_TURNS}'")  # by GNU's own library as it is loaded
    assert said >= ranks
    assert run.record["environment"]["env"]["GOMP_SPINCOUNT"] == str(SPIN_TURNS)


def test_the_record_says_what_the_user_has_chosen(harness: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = harness(*JOB, "engine=simulate", "hardware=h100_80g", OMP_WAIT_POLICY="passive")
    assert run.status == 0, run.stderr
    found = run.record["environment"]["env"]
    assert found["OMP_WAIT_POLICY"] == "passive" and "GOMP_SPINCOUNT" not in found
