"""What a sweep in rounds says of settings whose difference is known: real work on this machine, by the clock."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from omegaconf import OmegaConf
from support import toys
from support.runs import RANDOM, TINY, Run, python

from harness.basics.intervals import Interval, of_rounds
from harness.running.confirming import verdict
from harness.running.sweep import Sweep
from harness.running.sweep_table import SweepJob, SweepRun

ROUNDS = 8
ADDED = 0.03  # a sleep behind each pass, of its own length
# Another process that comes and goes: busy for a while, then not, each for up to so many seconds.
OTHER = """
import random, sys, time
drawn = random.Random(int(sys.argv[1]))
while True:
    end = time.monotonic() + drawn.uniform(0, 0.5)
    while time.monotonic() < end:
        pass
    time.sleep(drawn.uniform(0, 0.5))
"""


class Passes(Sweep):
    """A sweep whose runs are passes in this process, in place of launches; all else is the harness's."""

    def __init__(self) -> None:
        super().__init__(None)
        self.matrix = numpy.random.default_rng(0).random((160, 160), dtype=numpy.float32)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        """Keeps what would be printed."""
        self.said.append(line)

    def _launch(self, job: SweepJob, which: str) -> SweepRun:
        assert job.composed is not None
        worked, slept, passes = 0.0, 0.0, 0
        while worked < 0.04:
            began = time.perf_counter()
            for _ in range(4):
                self.matrix @ self.matrix
            done = time.perf_counter()
            worked, passes = worked + done - began, passes + 1
            if (owed := job.composed.added * worked - slept) > 0:
                time.sleep(owed)
                slept += time.perf_counter() - done
        rate = passes / (worked + slept)
        return SweepRun(
            f"{job.number}-{self.round}", "ok", None, rate, worked + slept, 0, round=(self.series, self.round)
        )


def ran(*added: float) -> list[SweepJob]:
    """Returns jobs with such sleeps, run in rounds."""
    sweep = Passes()
    composed = {
        "resume": None,
        "results_dir": "",
        "repeat": ROUNDS,
        "repeat_until": None,
        "sweep": {"resume": False, "least_s": 0},
    }
    jobs = [
        sweep.add([f"added={share}"], OmegaConf.create(composed | {"added": share}), [f"job={number}"])
        for number, share in enumerate(added)
    ]
    sweep.run(jobs)
    assert all(len(job.rates) == ROUNDS for job in jobs)
    return jobs


def ratio(job: SweepJob, to: SweepJob) -> Interval:
    found = of_rounds(job.by_round, to.by_round)
    assert found is not None
    return found


@pytest.mark.full
def test_launches_in_rounds_have_a_known_difference_in_their_interval(
    tmp_path: Path, harness: Callable[..., Run]
) -> None:
    words = ["-m", "engine=toy", toys.OPTIONS, *TINY, *RANDOM, "dataset.num_samples=20", "dataset.input_len=8"]
    words += ["dataset.output_len=4", "engine.work_s=0.05", f"engine.added=0,{ADDED}", "repeat=6"]
    run = harness(*words, **toys.installed(tmp_path / "site"))
    assert run.status == 0, run.stdout + run.stderr
    compared = python("-m", "harness.compare", str(run.results), "--baseline", run.rows[0]["run_id"], "--json")
    (found,) = (one for one in json.loads(compared.stdout)["groups"] if one["ratio_paired"])
    assert found["ratio_of"] == 6
    assert found["ratio_low"] <= 1 / (1 + ADDED) <= found["ratio_high"], found
    print(f"{found['ratio']:.4f}, {found['ratio_low']:.4f} to {found['ratio_high']:.4f}")


@pytest.fixture
def beside() -> Iterator[None]:
    """Has a process come and go beside the test."""
    other = subprocess.Popen([sys.executable, "-c", OTHER, "1"])
    yield
    other.kill()
    other.wait()


@pytest.mark.slow
def test_the_interval_has_a_known_difference_in_it_and_equal_settings_are_alike(scale: Callable[..., Any]) -> None:
    trials = scale(5, 20)
    right = different = 0
    for _ in range(trials):
        plain, slower, same = ran(0.0, ADDED, 0.0)
        found = ratio(slower, plain)
        right += found.low <= 1 / (1 + ADDED) <= found.high
        different += ratio(same, plain).clear
    assert right >= trials - max(trials // 10, 1), f"{right} of {trials}"
    assert different <= max(trials // 20, 1), f"{different} of {trials}"


@pytest.mark.slow
def test_beside_a_process_that_comes_and_goes_a_search_has_no_false_winner(
    scale: Callable[..., Any], beside: None
) -> None:
    for _ in range(scale(5, 20)):
        *others, default = ran(0.0, ADDED, ADDED, 0.0)
        found = verdict(others, default)
        assert found.winner is None, found.why
