"""A device's own time of passes, with a clock of the tests' in place of CUDA's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.engines import generate, requests, settings

from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.shared.device_time import DeviceTime
from harness.engines.statistics import EngineStatistics, merged_statistics


class Stamp:
    """An event of a stream whose work takes the times that the test says; it has come once ``come`` has passed it."""

    def __init__(self, times: Iterator[float], come: list[float]) -> None:
        self.times, self.come, self.at_ms = times, come, -1.0

    def record(self) -> None:
        self.at_ms = next(self.times)

    def query(self) -> bool:
        return self.at_ms <= self.come[0]

    def synchronize(self) -> None:
        self.come[0] = max(self.come[0], self.at_ms)

    def elapsed_time(self, end_event: Stamp) -> float:
        assert self.query() and end_event.query()
        return end_event.at_ms - self.at_ms


def test_passes_and_the_gaps_between_them_add_up() -> None:
    come = [0.0]
    times = iter([0.0, 9.0, 10.0, 30.0, 30.0, 45.0, 55.0, 60.0])
    measured = DeviceTime(torch.device("cpu"), lambda: Stamp(times, come))
    with measured.passing():
        pass
    measured.begin()  # the first was the warm-up's
    for now in (12.0, 31.0, 50.0):  # when the host looks: the latest pass is still under way
        with measured.passing():
            come[0] = now
    busy = measured.end()
    assert busy is not None
    assert (busy.busy_s, busy.gap_s, busy.passes) == (0.040, 0.010, 3)


def test_a_pass_that_fails_is_not_counted() -> None:
    times = iter([0.0, 1.0, 3.0])
    measured = DeviceTime(torch.device("cpu"), lambda: Stamp(times, [9.0]))
    with pytest.raises(ZeroDivisionError), measured.passing():
        raise ZeroDivisionError
    with measured.passing():
        pass
    busy = measured.end()
    assert busy is not None and (busy.busy_s, busy.passes) == (0.002, 1)


def test_an_engine_books_what_its_runner_measures() -> None:
    engine = FastGenEngine(settings(token_budget=64, max_sequences=8))
    engine.load()
    jobs = requests(5)
    generate(engine, jobs)
    assert engine.statistics.device_busy_s is None  # a CPU's passes are what the host sees of them
    ticks = iter(range(10**6))
    engine.runner.device_time = engine.device_time = DeviceTime(  # type: ignore[attr-defined]
        torch.device("cpu"), lambda: Stamp(map(float, ticks), [1e9])
    )
    generate(engine, jobs)
    steps = engine.statistics.steps
    assert steps is not None and steps > 1
    assert engine.statistics.device_busy_s == pytest.approx(steps / 1e3)
    assert engine.statistics.device_gap_s == pytest.approx((steps - 1) / 1e3)


def test_replicas_have_the_mean_where_all_know_it() -> None:
    def merged(*busy: float | None) -> float | None:
        return merged_statistics([EngineStatistics(device_busy_s=one) for one in busy]).device_busy_s

    assert (merged(1.0, 3.0), merged(1.0, None)) == (2.0, None)
