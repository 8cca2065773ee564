"""What tokens cost: joules and money, of runs with one segment and several, on one device and many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import run as made
from support.runs import SIMULATED, TINY, Run, assert_refused, python

from harness.config.identity import config_hash
from harness.results.directory import read_record
from harness.results.efficiency import cost, efficiency
from harness.results.table import read_rows
from harness.verify import recount
from harness.verify.__main__ import main as verify


def record(price: float | None, elapsed_s: float | None = 1800.0, **more: Any) -> dict[str, Any]:
    return {"config": {"hardware": {"price_per_hour": price}}, "devices": 4, "elapsed_s": elapsed_s} | more


def test_money_is_price_times_devices_times_hours() -> None:
    found = efficiency(record(2.5, total_tokens=4_000_000, energy_j=2e6))
    assert found == {"cost": 5.0, "tokens_per_joule": 2.0, "cost_per_million_tokens": 1.25}


def test_what_is_not_known_is_not_made_up() -> None:
    nothing = {"cost": None, "tokens_per_joule": None, "cost_per_million_tokens": None}
    assert efficiency(record(None, total_tokens=10, energy_j=None)) == nothing
    assert efficiency(record(2.5, None, total_tokens=10)) == nothing  # its clock was not stopped
    assert efficiency({}) == nothing
    assert efficiency(record(2.5, total_tokens=0, energy_j=3.0)) == nothing | {"cost": 5.0}


def test_each_segment_has_its_own_devices_price_and_time() -> None:
    parts = [record(2.5), record(1.0, 3600.0, devices=8)]
    whole = record(1.0, 5400.0, devices=8)
    assert cost(whole | {"segments": parts}) == 5.0 + 8.0
    assert cost(whole | {"segments": [record(None), parts[1]]}) is None
    assert cost(whole | {"segments": [{"elapsed_s": 0.0}, *parts]}) == 5.0 + 8.0  # it ended before its clock


def test_a_price_makes_no_other_job() -> None:
    jobs = [{"hardware": {"name": "cpu", **more}} for more in ({}, {"price_per_hour": None}, {"price_per_hour": 3.0})]
    assert len({config_hash(job) for job in jobs}) == 1
    assert config_hash({"hardware": {"name": "h100_80g"}}) != config_hash(jobs[0])


def test_the_columns_are_of_the_closed_run(tmp_path: Path) -> None:
    facts = {"config": {"hardware": {"price_per_hour": 36.0}}, "devices": 2, "energy_j": 50.0}
    made(tmp_path, "a", rate=100.0, **facts)  # 200 tokens in 2 s
    (row,) = read_rows(tmp_path / "runs.csv")
    assert (row["tokens_per_joule"], row["cost_per_million_tokens"]) == ("4", "200")
    kept = read_record(tmp_path, "a")
    assert kept is not None and kept["cost"] == 36.0 * 2 * 2 / 3600


def test_a_forged_cost_is_noticed() -> None:
    honest = record(2.5, total_tokens=4_000_000, energy_j=2e6)
    honest |= efficiency(honest)
    assert list(recount._costs(honest)) == []
    assert list(recount._costs({name: honest[name] for name in ("total_tokens", "energy_j")})) == []  # an older one
    for name in ("cost", "tokens_per_joule", "cost_per_million_tokens"):
        assert len(list(recount._costs(honest | {name: honest[name] * 0.99}))) == 1
        assert len(list(recount._costs(honest | {name: None}))) == 1


@pytest.mark.parametrize(
    ("hardware", "devices"),
    [
        (["hardware=h100_80g", "parallel.tp=2", "parallel.dp=2"], 4),  # GPUs
        (["hardware=cpu", "parallel.dp=4", "hardware.devices_per_node=2"], 2),  # hosts
    ],
)
def test_a_simulated_run_has_its_price(
    harness: Callable[..., Run], hardware: list[str], devices: int, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = ["hardware.memory_bytes=100000000000", "hardware.memory_bandwidth=1e11"]
    figures += ["hardware.peak_flops.float32=1e12", "hardware.interconnect_bandwidth=1e10", "hardware.price_per_hour=3"]
    job = ["dataset=synthetic", "dataset.num_samples=8", "dataset.input_len=30", "dataset.output_len=20"]
    run = harness(*TINY, *SIMULATED[:1], *hardware, *figures, *job)
    assert run.status == 0, run.stderr
    elapsed_s, per_million = float(run.row["elapsed_s"]), float(run.row["cost_per_million_tokens"])
    assert run.record["devices"] == devices
    assert per_million == pytest.approx(3 * devices * elapsed_s / 3600 / 400 * 1e6, rel=1e-4)
    assert "Cost" in run.stdout and "for a million total tokens" in run.stdout
    assert verify([str(run.directory)]) == 0, capsys.readouterr()


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf"])
def test_what_is_no_price_is_refused(price: str) -> None:
    done = python("harness/main.py", f"hardware.price_per_hour={price}", "dataset.num_samples=1")
    assert_refused(done, f"error: hardware.price_per_hour: {float(price)}; give what a device costs an hour, or null")
