"""costs.fitting and ``harness.plan --fit``: what runs tell of the pass times, and which runs tell nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.passes import HOST, KNOWN, MACHINE, SMALL, observed, recorded, works

from harness.config import own
from harness.config.schema import HardwareConfig
from harness.costs import fitting
from harness.costs.fitted import Fitted
from harness.costs.hazard import eos_hazard
from harness.costs.pass_time import PassTime
from harness.costs.roofline import CPU, on_other_ranks
from harness.costs.work import PassWork
from harness.engines.simulate.tokens import drawn_length
from harness.plan import __main__ as plan


def test_a_fit_finds_what_the_passes_took() -> None:
    runs = [
        observed(KNOWN, works(150, 512, 1), noise=0.05, seed=1, name="alone"),
        observed(KNOWN, works(150, 128, 2), noise=0.05, seed=2, ranks=2, name="two"),
    ]
    found = fitting.fit(runs, CPU, HOST)
    assert found.dropped == 0 and set(found.factors) == {1, 2}
    for ranks, factors in found.factors.items():
        true = on_other_ranks(KNOWN, 1, ranks, HOST)
        exact = observed(KNOWN, works(90, 400, 3), ranks=ranks)
        off = fitting.predicted(exact, factors) / exact.seconds - 1
        assert float(np.max(np.abs(off))) < 0.1 and abs(float(np.median(off))) < 0.03
        for name in ("matrices", "attention", "kv"):
            assert getattr(factors, name) == pytest.approx(getattr(true, name), rel=0.1)
        for name in fitting.HOST:
            assert getattr(factors, name) == pytest.approx(getattr(true, name), rel=0.02)
        assert not {"matrices", "attention", "kv"} & set(found.untold[ranks])
        assert "pointwise" in found.untold[ranks]  # nothing tells it from the products
    kinds = fitting.held_out(runs, CPU, HOST)
    assert set(kinds) == {"prefill", "mixed", "decode"}
    assert sum(one.passes for one in kinds.values()) == 300
    assert all(0.01 < one.median < 0.06 and abs(one.bias) < 0.03 for one in kinds.values())
    assert all(abs(error) < 0.03 for error in fitting.totals(runs, found.factors).values())
    left_out = fitting.left_out(runs, CPU, HOST)
    assert set(left_out) == {"alone", "two"} and all(abs(error) < 0.1 for error in left_out.values())


def test_passes_that_were_disturbed_are_left_out() -> None:
    run = observed(KNOWN, works(150, 512, 1), noise=0.02, seed=1)
    run.seconds[[10, 50, 90]] *= 4
    found = fitting.fit([run], CPU, HOST, own_hosts=False)
    assert found.dropped == 3
    assert found.factors[1].matrices == pytest.approx(KNOWN.matrices, rel=0.1)


def test_a_machine_far_from_what_is_assumed_is_fitted_from_few_passes() -> None:
    names = [name for name in fitting.PASS if name != "norm"]
    for scale in (1 / 20, 30):
        slow = replace(KNOWN, **{name: getattr(KNOWN, name) * scale for name in names})
        run = observed(slow, works(15, 256, 1), noise=0.2, seed=3)
        found = fitting.fit([run], CPU, HOST)
        assert found.dropped <= 3
        guessed, took = fitting.total_seconds(run, found.factors[1])
        assert guessed == pytest.approx(took, rel=0.15)


def test_a_kind_needs_a_few_passes() -> None:
    assert fitting.kinds_seen([observed(KNOWN, works(20, 256, 1, "d"))]) == ["decode"]
    assert fitting.kinds_seen([observed(KNOWN, works(20, 256, 1, "md"))]) == ["mixed", "decode"]


def test_the_chance_of_an_end_is_ends_over_tokens() -> None:
    hazard = eos_hazard([(1, True), (3, True), (3, False), (5, True)])
    # Position 1: four tokens, one ends. 2 to 3: two tokens of each of the other three, one ends. 4 to 7: two, one ends.
    assert hazard == [(1, 1 / 4), (2, 1 / 6), (4, 1 / 2)]
    assert eos_hazard([]) == []
    lengths = [drawn_length(0, index, hazard) or 50 for index in range(4000)]
    assert lengths.count(1) == pytest.approx(1000, rel=0.1)
    assert lengths.count(2) + lengths.count(3) == pytest.approx(3000 * (1 - (5 / 6) ** 2), rel=0.1)


# --- the command ---


def command(tmp_path: Path, *words: str) -> int:
    return plan.main([*words, "--results-dir", str(tmp_path)])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    recorded(place, "alone", works(90, 256, 1), seed=1)
    recorded(place, "two", works(90, 128, 2), seed=2, token_budget=128)
    return place


@pytest.fixture
def runs(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(own, "CONF", tmp_path)
    (tmp_path / "hardware").mkdir()
    shutil.copytree(both, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_fit_is_written_and_read_back(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["hardware.peak_flops.float32=1e11", "hardware.memory_bandwidth=2e10"]
    assert command(runs, *given, "--fit", "alone", str(runs / "two")) == 0
    said = capsys.readouterr().out
    assert "180 passes of 2 runs" in said and "decode" in said and "two" in said
    content = yaml.safe_load((runs / "hardware" / "local.yaml").read_text())
    assert content["peak_flops"] == {"float32": 1e11} and content["accelerator"] == "cpu"
    section = content["fit"]
    assert section["runs"] == ["alone", "two"] and section["range"]["token_budget"] == [128, 256]
    assert section["eos_rate"] == pytest.approx(0.25, rel=0.2)
    fitted = Fitted.of(section)
    assert fitted is not None and fitted.error == max(map(abs, section["errors"]["left_out"].values())) < 0.1
    assert fitted.factors[1].kv == pytest.approx(KNOWN.kv, rel=0.15)
    times = PassTime(SMALL, replace(MACHINE, fit=section), "float32", 1, 1, 200, 64)
    work = PassWork(200, 180, 20, 22, 21, 9000, 30000)
    exact = PassTime(SMALL, MACHINE, "float32", 1, 1).with_factors(**asdict(KNOWN))
    assert times.outside == [] and times.seconds(work) == pytest.approx(exact.seconds(work), rel=0.05)
    # local is written anew, a file with a name is not.
    assert command(runs, *given, "--fit", "alone") == 0
    assert command(runs, *given, "--fit", "alone", "--name", "mine") == 0
    assert command(runs, *given, "--fit", "alone", "--name", "mine") == 2
    assert "mine.yaml is there already" in capsys.readouterr().err


def change_record(directory: Path, **changes: Any) -> None:
    path = directory / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def older(directory: Path) -> None:
    path = directory / "passes.csv"
    path.write_text("\n".join(",".join(line.split(",")[:9]) for line in path.read_text().splitlines()) + "\n")


def decodes_alone(directory: Path) -> None:
    lines = (directory / "passes.csv").read_text().splitlines()
    kept = [line for line in lines[1:] if line.split(",")[4] == "0"]
    (directory / "passes.csv").write_text("\n".join([lines[0], *kept]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "'alone' is no run of "),
        (lambda directory: (directory / "passes.csv").unlink(), "alone has no passes"),
        (older, "the passes of alone lack logit_rows"),
        (decodes_alone, "alone has passes of one kind only: decode"),
        (lambda directory: change_record(directory, engine="simulate"), "alone is a simulation"),
        (lambda directory: change_record(directory, engine="mii"), "alone is a run of 'mii'"),
        (lambda directory: change_record(directory, status="failed"), "alone is 'failed'"),
        (lambda directory: change_record(directory, segments=[{}]), "alone was interrupted"),
        (lambda directory: change_record(directory, config={}), "the config of alone is another version's"),
        (lambda directory: (directory / "record.json").write_text("{"), "'alone' is no run of "),
    ],
)
def test_runs_that_tell_nothing_are_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(runs / "alone")
    assert command(runs, "--fit", "alone") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --fit: {message}") and error.count("\n") == 1
    assert not list((runs / "hardware").iterdir())


def test_runs_of_two_models_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_record(runs / "two", kernels="torch")
    assert command(runs, "--fit", "alone", "two") == 2
    assert "the runs differ in kernels" in capsys.readouterr().err
    assert command(runs, "--fit", "alone", "--name", "../x") == 2
    assert "--name" in capsys.readouterr().err


def test_without_figures_the_best_of_the_passes_is_taken(runs: Path) -> None:
    assert command(runs, "--fit", "alone") == 0
    content = yaml.safe_load((runs / "hardware" / "local.yaml").read_text())
    assert 0 < content["peak_flops"]["float32"] < 1e11  # the known factors are above 1
    times = PassTime(SMALL, HardwareConfig(**content), "float32", 1, 1)
    work = PassWork(200, 180, 20, 22, 21, 9000, 30000)
    exact = PassTime(SMALL, MACHINE, "float32", 1, 1).with_factors(**asdict(KNOWN))
    assert times.seconds(work) == pytest.approx(exact.seconds(work), rel=0.05)
