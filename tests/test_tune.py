"""tune.py, confirming.py, winner.py: a search names a winner only where the rounds show one, and writes it down."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import RANDOM, ROOT, SIMULATED, TINY, Run, python

from harness.basics.errors import UserError
from harness.config.own import results_of
from harness.config.schema import Config, DatasetConfig, EngineConfig, HardwareConfig, ModelConfig, SweepConfig, Weights
from harness.running import winner
from harness.running.confirming import drop_behind, verdict
from harness.running.sweep_table import SweepJob, SweepRun
from harness.running.tune import parallel_splits
from harness.running.winner import without_search

Harness = Callable[..., Run]
SMALL = [*TINY, *RANDOM, "dataset.num_samples=3", "dataset.input_len=70", "dataset.output_len=3"]
FASTER = ["engine.token_budget=128"]


def job(rates: Sequence[float], varied: list[str], simulated: bool = False, status: str = "ok") -> SweepJob:
    """Returns a job that had these rates in the rounds of one series."""
    runs = [
        SweepRun(f"{varied}{at}", status, None, rate, 1.0, 0, simulated=simulated, round=("s", at))
        for at, rate in enumerate(rates)
    ]
    return SweepJob(1, varied, varied, runs)


# --- what the rounds show ---


DEFAULT = [100.0, 101.0, 99.0, 70.0, 100.5, 99.5]  # something took a part of the machine in the fourth round


@pytest.mark.parametrize(
    ("rates", "named", "said"),
    [
        ([110.0, 111.5, 108.5, 77.2, 110.4, 109.9], True, "1.101 times the defaults ("),
        ([102.0, 99.0, 103.0, 69.0, 99.5, 105.0], False, "no difference shown: the best of the search, "),
        ([90.0, 91.0, 89.0, 62.9, 90.5, 89.6], False, "the defaults are faster: the best of the search, "),
        ([200.0, 201.0], False, "no difference shown: fewer than 3 rounds of them and the defaults were ok"),
    ],
)
def test_a_winner_is_named_only_where_its_interval_is_clear_of_the_defaults(
    rates: list[float], named: bool, said: str
) -> None:
    best = job(rates, FASTER)
    found = verdict([best, job([50.0] * len(rates), ["engine.token_budget=8"])], job(DEFAULT, []))
    assert (found.winner is best) is named
    assert found.why.startswith(said), found.why


def test_of_several_that_are_faster_the_fastest_wins() -> None:
    near, far = job([rate * 1.1 for rate in DEFAULT], FASTER), job([rate * 1.2 for rate in DEFAULT], ["x=1"])
    assert verdict([near, far], job(DEFAULT, [])).winner is far
    wild = job([130.0, 150.0, 90.0, 91.0, 140.0, 99.0], ["x=2"])  # the highest median, and nothing is known of it
    assert verdict([near, wild], job(DEFAULT, [])).winner is near


def test_what_is_behind_runs_no_more() -> None:
    far, near, best = (job([rate * by for rate in DEFAULT], [f"x={by}"]) for by in (0.8, 1.09, 1.1))
    near.runs[0] = replace(near.runs[0], tokens_per_s=150.0)
    for one in (far, near, best):
        one.times = 8
    default = job(DEFAULT, [])
    default.times = 8
    drop_behind([far, near, best], default)
    assert [one.finished for one in (far, near, best, default)] == [True, False, False, False]
    drop_behind([far], default)
    assert not default.finished  # there was nothing left to decide
    slow = job([rate * 0.9 for rate in DEFAULT], ["x=1"])
    slow.times = 8
    drop_behind([slow], default)
    assert slow.finished and default.finished


def test_runs_that_are_not_ok_decide_nothing() -> None:
    good, bad = job(DEFAULT, FASTER), job(DEFAULT, [], status="oom")
    assert verdict([good, bad], bad).winner is good
    assert verdict([bad], good).winner is None
    assert verdict([], good).why == "the best of the search are the defaults"
    with pytest.raises(UserError, match="no run of the best was ok"):
        verdict([bad], bad)


@pytest.mark.parametrize(
    ("rate", "said"),
    [(101.0, "1.010 times the defaults (simulated)"), (100.0, "no difference: "), (99.0, "the defaults are faster: ")],
)
def test_of_a_simulated_job_one_run_says_all(rate: float, said: str) -> None:
    best = job([rate], FASTER, simulated=True)
    found = verdict([best], job([100.0], [], simulated=True))
    assert (found.winner is best) is (rate > 100) and found.why.startswith(said)


def shared_machine(drawn: random.Random, jobs: int, rounds: int, faster: float) -> list[SweepJob]:
    """Returns jobs that ran in rounds while another process came and went, the last of them the defaults.

    The process takes up to two thirds of the machine, for a few runs at a time; what is left has 1% of noise.
    """
    rates: list[list[float]] = [[] for _ in range(jobs)]
    taken, left = 0.0, 0
    for number in range(rounds):
        order = range(jobs) if number % 2 else reversed(range(jobs))
        for one in order:
            if left == 0:
                taken, left = (0.0 if taken or drawn.random() < 0.5 else drawn.uniform(0.1, 0.67)), drawn.randint(1, 9)
            left -= 1
            true = 100.0 * (faster if one == 0 and jobs > 1 else 1.0)
            rates[one].append(true * (1 - taken * drawn.random()) * math.exp(drawn.gauss(0.0, 0.01)))
    return [job(rates[one], [f"x={one}"] if one < jobs - 1 else []) for one in range(jobs)]


def test_beside_a_process_that_comes_and_goes_no_false_winner_is_named(scale: Callable[..., Any]) -> None:
    drawn = random.Random(20)
    tunes = scale(100, 2000)
    false = 0
    for _ in range(tunes):
        *others, default = shared_machine(drawn, jobs=4, rounds=8, faster=1.0)
        false += verdict(others, default).winner is not None
    assert false <= tunes // 200, f"{false} of {tunes}"


def test_on_a_quiet_machine_a_small_difference_is_found(scale: Callable[..., Any]) -> None:
    drawn = random.Random(3)
    tunes = scale(40, 400)
    found = 0
    for _ in range(tunes):
        rates = [[100.0 * by * math.exp(drawn.gauss(0.0, 0.01)) for _ in range(8)] for by in (1.05, 0.98, 1.0, 1.0)]
        *others, default = (job(one, [f"x={number}"] * (number < 3)) for number, one in enumerate(rates))
        found += verdict(others, default).winner is others[0]
    assert found >= 0.9 * tunes, f"{found} of {tunes}"


# --- what is written ---


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "tuned_llama2-7b_a100-80g-simulated.yaml"),
        ("{tmp}/Llama-2.7b chat", "tuned_Llama-2-7b-chat_a100-80g-simulated.yaml"),
    ],
)
def test_the_file_is_named_after_checkpoint_and_machine(tmp_path: Path, path: str | None, name: str) -> None:
    architecture = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    architecture |= {"vocab_size": 512, "intermediate_size": 128, "max_position_embeddings": 64}
    settings = Config(
        engine=EngineConfig("simulate"),
        model=ModelConfig("llama2_7b", architecture=architecture, weights=Weights.dummy),
        dataset=DatasetConfig("sample"),
        hardware=HardwareConfig("a100_80g"),
        results_dir=str(tmp_path),
    )
    if path is not None:
        settings.model.path = path.format(tmp=tmp_path)
        Path(settings.model.path).mkdir()
        (Path(settings.model.path) / "config.json").write_text(json.dumps(architecture))
    assert winner.place(settings) == tmp_path / "tuned" / "experiment" / name
    settings.sweep = SweepConfig(save_as="mine")
    assert winner.place(settings) == ROOT / "conf" / "experiment" / "mine.yaml"


@pytest.mark.parametrize(
    ("words", "results"),
    [
        ([], "results"),
        (["results_dir=/a", "results_dir=b c"], "b c"),
        (["results_dir='a,b'", "x.results_dir=/c"], "a,b"),
    ],
)
def test_where_a_command_line_s_results_lie(words: list[str], results: str) -> None:
    assert results_of(words) == results


def test_the_winner_s_command_keeps_what_the_search_was_about() -> None:
    words = ["engine.token_budget=64", "experiment=[asc24_70b_8gpu,tune]", "model.path=/m", "dataset.num_samples=9"]
    words += ["sweep.confirm=1", "hydra.verbose=true", "timeout_s=5", "+model.architecture.x=1"]
    kept = ["experiment=[asc24_70b_8gpu]", "model.path=/m", "+model.architecture.x=1"]
    assert without_search(words, {"engine.token_budget": 64}, makes_requests=False) == kept
    assert "dataset.num_samples=9" in without_search(words, {}, makes_requests=True)
    assert without_search(["experiment=tune"], {}, makes_requests=False) == []


@pytest.mark.parametrize(
    ("devices", "cuda", "kv_heads", "pairs"),
    [
        (8, True, 8, [(1, 8), (2, 4), (4, 2), (8, 1)]),
        (8, True, 2, [(1, 8), (2, 4)]),
        (6, True, None, [(1, 6), (2, 3), (4, 1)]),
        (3, False, 3, [(1, 1), (1, 2), (1, 3)]),
        (1, False, None, [(1, 1)]),
        (0, True, None, [(1, 1)]),
    ],
)
def test_parallel_splits(devices: int, cuda: bool, kv_heads: int | None, pairs: list[tuple[int, int]]) -> None:
    assert parallel_splits(devices, cuda, kv_heads) == pairs


# --- whole searches ---


@pytest.mark.slow
def test_tune_confirms_the_best_beside_the_defaults_and_writes_it_down(harness: Harness) -> None:
    name = f"tuned_test_{uuid.uuid4().hex[:8]}"
    path = ROOT / "conf" / "experiment" / f"{name}.yaml"
    search = [
        *("-m", "experiment=tune", *SMALL, *SIMULATED, f"sweep.save_as={name}"),
        *("engine.token_budget=choice(32,64)", "engine.max_sequences=64", "parallel.dp=1", "parallel.tp=1"),
        *("hydra.sweeper.n_trials=4", "sweep.confirm=1", "sweep.confirm_samples=6"),
    ]
    try:
        run = harness(*search)
        assert run.status == 0, run.stderr  # a bad trial is no failure of the search
        searched = [row for row in run.rows if row["requests"] in ("", "3")]
        confirmed = [row for row in run.rows if row["requests"] == "6"]
        # Of four trials each value ran once: a repeated one is known already, or refused again.
        assert sum(row["status"] == "ok" for row in searched) == 1
        assert {row["status"] for row in searched} == {"ok", "invalid"}
        assert [(row["status"], row["token_budget"]) for row in confirmed] == [("ok", "64"), ("ok", "2048")]
        records = [json.loads((run.results / row["run_id"] / "record.json").read_text()) for row in confirmed]
        rates = {record["token_budget"]: record["total_tokens_per_s"] for record in records}
        ratio = rates[64] / rates[2048]  # what auto takes here
        assert f"{ratio:.3f} times the defaults (simulated)" in run.stdout
        if ratio <= 1:
            assert "nothing is written" in run.stdout and not path.exists()
            return
        found: dict[str, Any] = yaml.safe_load(path.read_text())
        assert found == {"engine": {"token_budget": 64}}
        assert path.read_text().startswith("# @package _global_\n")
        shown = python("harness/main.py", f"experiment={name}", "--cfg", "job")
        assert yaml.safe_load(shown.stdout)["engine"]["token_budget"] == 64
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.slow
def test_what_a_search_has_found_lies_in_the_results_and_is_an_experiment_there(harness: Harness) -> None:
    search = [*("-m", "experiment=tune", *SMALL, *SIMULATED), "engine.token_budget=choice(64)"]
    search += ["engine.max_sequences=choice(2)", "parallel.dp=1", "parallel.tp=1", "dataset.num_samples=40"]
    run = harness(*search, "hydra.sweeper.n_trials=1", "dataset.output_len=40")
    assert run.status == 0, run.stderr
    (path,) = [*(run.results / "tuned" / "experiment").glob("*.yaml")] or [None]
    named = "winner: " in run.stdout
    assert named is (path is not None), run.stdout
    if path is None:  # the defaults were as fast: what a search would have written
        path = run.results / "tuned" / "experiment" / "tuned_x.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("# @package _global_\nengine:\n  max_sequences: 2\n")
    shown = python("harness/main.py", f"experiment={path.stem}", f"results_dir={run.results}", "--cfg", "job")
    assert yaml.safe_load(shown.stdout)["engine"]["max_sequences"] == 2, shown.stderr


@pytest.mark.slow
def test_a_search_lengthens_its_trials_and_an_interrupted_one_goes_on_with_its_rounds(harness: Harness) -> None:
    search = [*("-m", "experiment=tune", *TINY, *RANDOM), "dataset.input_len=20", "dataset.output_len=4"]
    search += ["dataset.num_samples=1", "engine.token_budget=choice(32)", "engine.max_sequences=choice(4)"]
    search += ["parallel.dp=1", "parallel.tp=1", "hydra.sweeper.n_trials=1", "sweep.confirm_samples=2"]
    search += ["sweep.confirm=1", "sweep.least_s=0.05"]
    first = harness(*search, "sweep.confirm_rounds=3")
    assert first.status == 0, first.stdout + first.stderr
    assert "less than sweep.least_s=0.05 s: each trial gets dataset.num_samples=" in first.stdout
    records = [json.loads((first.results / row["run_id"] / "record.json").read_text()) for row in first.rows]
    series = [one["round"] for one in records if one["round"]["series"].startswith("confirm-")]
    numbers = [one["number"] for one in series]
    assert numbers[:6] == [1, 1, 2, 2, 3, 3] and numbers == sorted(numbers)  # and more, up to sweep.least_s
    ran = len(first.rows)
    again = harness(*search, "sweep.confirm_rounds=3")
    assert again.status == 0, again.stdout + again.stderr
    assert len(again.rows) == ran  # all of it ran before, in the same rounds
    said = [line for line in first.stdout.splitlines() if "times the defaults" in line]
    assert said and said == [line for line in again.stdout.splitlines() if "times the defaults" in line]
