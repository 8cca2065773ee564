"""``engine=simulate``: the real scheduler's passes on a virtual clock, as a run that is marked as none of a machine."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import made_runs
from support.in_process import answered, begin_anew
from support.runs import ROOT, TINY, Run, assert_refused, begun, command, python, ran, variables

from harness.basics.errors import UserError
from harness.compare.comparison import compare
from harness.compare.reading import load
from harness.config.compose import compose
from harness.costs.work import PassWork
from harness.engines import catalogue
from harness.engines.simulate.replay import Event, Finished, Item, Pass, Rejected, Setup, replay
from harness.engines.simulate.tokens import drawn_length, token_ids
from harness.ranks.rank import Rank
from harness.results.completions import read_completions
from harness.results.table import read_rows
from harness.running.job import prepare
from harness.running.setup import engine_settings
from harness.verify import __main__ as verify

Harness = Callable[..., Run]
H100 = ["engine=simulate", "model=llama2_70b", "hardware=h100_80g"]
FIGURES = ["hardware.peak_flops.float32=1e11", "hardware.memory_bandwidth=1e10"]
RANDOM = ["dataset=synthetic", "dataset.prompt=random"]
TIMES = {"started_s", "seconds"}


class Even:
    """A pass takes a second for ten tokens, and its host a hundredth."""

    def seconds(self, work: PassWork) -> float:
        return work.tokens / 10

    def host_seconds(self, work: PassWork, finished: int, admitted_tokens: int) -> float:
        return 0.01


def items(count: int, seed: int = 1, early: bool = False) -> list[Item]:
    chance = random.Random(seed)
    found = []
    for uid in range(count):
        most = chance.randint(1, 30)
        found.append(Item(uid, chance.randint(1, 40), most, chance.randint(1, most) if early else most))
    return found


def played(asked: list[Item], **changes: Any) -> list[Event]:
    setup = {"token_budget": 16, "max_sequences": 4, "block_size": 4, "blocks": 40} | changes
    return list(replay(asked, Setup(**setup), Even()))


def passes_of(run: Run) -> list[dict[str, str]]:
    with open(run.directory / "passes.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the replay ---


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("early", [False, True])
def test_every_request_ends_where_it_should_and_each_replica_has_one_pass_at_a_time(replicas: int, early: bool) -> None:
    asked = items(50, early=early)
    events = played(asked, replicas=replicas, lookahead=4)
    ended = {event.uid: event for event in events if isinstance(event, Finished)}
    assert {uid: event.output_tokens for uid, event in ended.items()} == {one.uid: one.output_tokens for one in asked}
    for one in asked:
        assert ended[one.uid].finish_reason == ("eos" if one.output_tokens < one.max_new_tokens else "length")
        assert 0 < ended[one.uid].first_token_s <= ended[one.uid].finished_s
    assert [event.finished_s for event in ended.values()] == sorted(event.finished_s for event in ended.values())
    for number in range(replicas):
        mine = [event for event in events if isinstance(event, Pass) and event.replica == number]
        assert mine
        for before, after in pairwise(mine):
            assert after.started_s == pytest.approx(before.started_s + before.seconds + 0.01)


def test_the_replica_that_is_slow_takes_fewer_requests_of_the_shared_queue() -> None:
    events = played(items(200), replicas=2, lookahead=1, slow=(1.0, 3.0))
    took = Counter(event.replica for event in events if isinstance(event, Finished))
    assert 2 * took[1] < took[0]
    ends = [max(e.started_s + e.seconds for e in events if isinstance(e, Pass) and e.replica == n) for n in (0, 1)]
    assert min(ends) > 0.8 * max(ends)  # neither waits long for the other


def test_what_the_cache_could_never_hold_is_rejected() -> None:
    events = played([Item(0, 10, 5, 5), Item(1, 500, 5, 5), Item(2, 10, 5, 5)])
    (rejected,) = [event for event in events if isinstance(event, Rejected)]
    assert rejected.uid == 1 and "the cache has 40" in rejected.reason
    assert {event.uid for event in events if isinstance(event, Finished)} == {0, 2}


def test_a_small_cache_preempts_and_loses_nothing() -> None:
    events = played(items(60), blocks=20)
    passes = [event for event in events if isinstance(event, Pass)]
    fed = sum(event.work.tokens for event in passes)
    assert fed > sum(one.prompt_tokens + one.output_tokens - 1 for one in items(60))  # some of it again
    assert sum(event.work.logit_rows for event in passes) == sum(one.output_tokens for one in items(60))


def test_token_ids_are_those_of_request_and_position_and_end_with_a_stop_only_at_the_end() -> None:
    long, short = token_ids(7, 500, False, 100, [2, 5]), token_ids(7, 20, True, 100, [2, 5])
    assert long[:19] == short[:19] and short[-1] == 2
    assert set(long) <= set(range(100)) - {2, 5} and len(set(long)) > 50
    assert long != token_ids(8, 500, False, 100, [2, 5])


def test_lengths_are_drawn_from_the_chance_of_an_end() -> None:
    drawn = [drawn_length(0, index, [(1, 0.02)]) or 0 for index in range(20_000)]
    assert min(drawn) == 1
    assert sum(drawn) / len(drawn) == pytest.approx(50, rel=0.03)
    assert drawn[:50] == [drawn_length(0, index, [(1, 0.02)]) for index in range(50)]
    assert drawn[:50] != [drawn_length(1, index, [(1, 0.02)]) for index in range(50)]
    by_position = [drawn_length(0, index, [(1, 0.0), (10, 0.5), (12, 0.0)]) for index in range(20_000)]
    counts = Counter(by_position)
    assert set(counts) == {10, 11, None}
    assert counts[10] / 20_000 == pytest.approx(0.5, abs=0.02) and counts[None] / 20_000 == pytest.approx(
        0.25, abs=0.02
    )
    assert drawn_length(0, 1, []) is None


# --- runs ---


def test_its_passes_are_those_of_a_real_run(harness: Harness, tmp_path: Path) -> None:
    # A block of 8 tokens has 8 KiB: 30 of them, so that sequences are preempted.
    sizes = [
        "engine.token_budget=24",
        "engine.max_sequences=8",
        "engine.kv_block_size=8",
        f"engine.kv_memory={30 * 8192}",
    ]
    asked = [*TINY, *RANDOM, "dataset.num_samples=40", "dataset.input_len=21", "dataset.output_len=17", *sizes]
    real = harness("engine=fastgen", "engine.kernels=torch", *asked, results=tmp_path / "real")
    simulated = harness("engine=simulate", *asked, *FIGURES, results=tmp_path / "simulated")
    assert (real.status, simulated.status) == (0, 0), simulated.stderr
    assert int(real.row["preemptions"]) > 0
    theirs, ours = passes_of(real), passes_of(simulated)
    assert len(ours) > 50
    for one, other in zip(theirs, ours, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    same = ("completed", "prompt_tokens", "output_tokens", "steps", "preemptions", "kv_peak_utilisation", "requests")
    assert {name: real.row[name] for name in same} == {name: simulated.row[name] for name in same}


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of 70B on eight devices, two replicas, its outputs drawn."""
    results = tmp_path_factory.mktemp("seventy")
    return ran(results, *H100, "parallel.tp=4", "parallel.dp=2", "engine.eos_rate=0.01")


def test_a_run_says_that_it_was_simulated_and_by_which_figures(seventy: Run) -> None:
    assert seventy.status == 0, seventy.stderr
    row, record = seventy.row, seventy.record
    assert (row["simulated"], row["device"], row["device_name"]) == ("data sheet", "cuda", "h100_80g (simulated)")
    assert (row["tp"], row["dp"], row["kernels"], row["energy_j"]) == ("4", "2", "simulated", "")
    assert record["simulation"]["figures"] == "data sheet" and record["simulation"]["outside"] == []
    assert "SIMULATED" in seventy.stdout and "the figures of hardware=h100_80g" in seventy.stdout
    assert any("no tokenizer.json at hand" in note for note in record["notes"])
    lines = seventy.completions.values()
    assert Counter(line["finish_reason"] for line in lines).keys() == {"eos", "length"}
    assert 0 < float(row["model_flops_utilisation"]) < 1
    assert int(row["peak_memory_bytes"]) < 80e9
    assert max(line["finished_s"] for line in lines) <= float(row["elapsed_s"]) * (1 + 1e-6)


def test_each_replica_is_told_of_as_in_a_real_run(seventy: Run) -> None:
    replicas, row = seventy.record["replicas"], seventy.row
    assert [one["rank"] for one in replicas] == [0, 4]
    assert replicas[0]["passes"] == len(passes_of(seventy))
    assert sum(one["passes"] for one in replicas) == int(row["steps"])
    lines = seventy.completions.values()
    fed = sum(line["prompt_tokens"] + line["output_tokens"] - 1 for line in lines if line["output_tokens"])
    assert sum(one["tokens"] for one in replicas) == fed and min(one["tokens"] for one in replicas) > 0
    assert max(one["elapsed_s"] for one in replicas) == seventy.record["elapsed_s"]
    assert all(0 < one["forward_s"] < one["elapsed_s"] for one in replicas)


def test_it_is_recounted_and_what_was_changed_is_found(seventy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = [seventy.row["run_id"], "--results", str(seventy.results)]
    assert verify.main(words) == 0
    assert "its times were computed and its tokens made up" in capsys.readouterr().out
    assert verify.main([*words, "--model"]) == 2
    assert "is simulated, and its tokens are made up" in capsys.readouterr().err
    path = seventy.directory / "completions.jsonl"
    kept = path.read_bytes()
    first, _, rest = kept.partition(b"\n")
    line = json.loads(first)
    line["token_ids"][0] += 1
    path.write_bytes(json.dumps(line).encode() + b"\n" + rest)
    assert verify.main(words) == 1
    assert "its token ids are not those that a simulation makes" in capsys.readouterr().out
    path.write_bytes(kept)


def test_the_same_run_again_is_the_same(harness: Harness, seventy: Run) -> None:
    again = harness(*H100, "parallel.tp=4", "parallel.dp=2", "engine.eos_rate=0.01")
    assert again.token_ids == seventy.token_ids
    assert passes_of(again) == passes_of(seventy)
    assert again.row["total_tokens_per_s"] == seventy.row["total_tokens_per_s"]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.argv = ["harness/main.py", *{H100!r}, "parallel.tp=2", "results_dir={tmp_path}", "dataset.num_samples=3"]
sys.path.insert(0, "{ROOT / "harness"}")
import runpy
try:
    runpy.run_path("harness/main.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
heavy = [name for name in ("torch", "transformers", "deepspeed", "pandas", "optuna") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "runs.csv")) == 1


def killed(results: Path, *words: str) -> str:
    """Starts a simulation that takes its time, kills it once some requests are done, and returns its run id."""
    line = command(*H100, "parallel.tp=8", *words, f"results_dir={results}")
    process = begun(line)
    for _ in range(1200):
        if [path for path in results.glob("*/completions.jsonl") if path.read_bytes().count(b"\n") > 5]:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for _ in range(400):
        if (results / "runs.csv").exists():
            (row,) = read_rows(results / "runs.csv")
            return row["run_id"]
        time.sleep(0.05)
    raise AssertionError("no row")


def test_a_killed_simulation_has_a_row_and_is_resumed_on_its_own_clock(harness: Harness, tmp_path: Path) -> None:
    results = tmp_path / "results"
    run_id = killed(results, "engine.pace=4")
    (row,) = read_rows(results / "runs.csv")
    assert row["status"] == "failed" and "SIGKILL" in row["error"] and row["simulated"] == "data sheet"
    before = {line["index"]: line for line in read_completions(results / run_id / "completions.jsonl")}
    assert len(before) == int(row["completed"])
    run = harness(*H100, "parallel.tp=8", f"resume={run_id}", results=results)
    assert run.status == 0, run.stderr
    assert run.row["completed"] == "72"
    assert all(run.completions[index] == line for index, line in before.items())
    first, last = run.record["segments"]
    assert not first["elapsed_is_estimated"]
    assert first["clock_to_s"] >= max(line["finished_s"] for line in before.values())
    assert float(run.row["elapsed_s"]) == pytest.approx(first["elapsed_s"] + last["elapsed_s"])
    after = [line for index, line in run.completions.items() if index not in before]
    assert min(line["finished_s"] for line in after) > first["clock_to_s"]
    assert verify.main([run_id, "--results", str(results)]) == 0


def test_a_sweep_over_both_engines_keeps_them_apart(tmp_path: Path) -> None:
    words = [*TINY, *RANDOM, *FIGURES, "dataset.num_samples=8", "dataset.input_len=16", "dataset.output_len=8"]
    done = ran(tmp_path, "-m", *words, "engine=fastgen,simulate", "engine.kernels=torch")
    assert done.status == 0, done.stderr
    assert Counter(row["simulated"] for row in done.rows) == {"": 1, "data sheet": 1}
    table = [
        words for words in map(str.split, done.stdout.splitlines()) if "100%" in words
    ]  # each the best of its kind
    assert [("simulate" in words, "(simulated)" in words) for words in table] == [(False, False), (True, True)]
    compared = compare(load([str(tmp_path)], lambda line: None))
    measured, simulated = compared.groups
    assert measured.predicted is simulated and not measured.simulated
    assert "simulated" in simulated.differs_in


def made(results: Path, name: str, rate: float, budget: int, figures: str = "", **changes: Any) -> None:
    changes |= {"simulated": figures or None, "engine.token_budget": budget}
    if figures:
        changes |= {
            "device_name": "x (simulated)",
            "git_commit": "beef" * 10,
            "kernels": "simulated",
            "engine.eos_rate": 1,
            "engine.name": "simulate",
        }
    made_runs.run(results, name, rate, **changes)


def test_compare_shows_the_prediction_beside_the_measurement(tmp_path: Path) -> None:
    for name, rate, budget in (("a", 100.0, 128), ("b", 50.0, 512), ("c", 70.0, 2048)):
        made(tmp_path, f"{name}-fastgen", rate, budget)
    made(tmp_path, "a-simulate", 110.0, 128, "data sheet")
    made(tmp_path, "b-simulate", 45.0, 512, "fit")
    made(tmp_path, "d-simulate", 400.0, 512, "data sheet")  # of less worth than the fitted one
    made(tmp_path, "e-simulate", 90.0, 512, "fit", device="cuda")  # of another kind of device
    compared = compare(load([str(tmp_path)], lambda line: None))
    assert [bool(one.simulated) for one in compared.groups] == [False] * 3 + [True] * 4  # whatever is faster
    assert compared.baseline is not None and not compared.baseline.simulated
    beside = {one.run_id: one.predicted and one.predicted.run_id for one in compared.groups}
    assert {name: found for name, found in beside.items() if found} == {
        "a-fastgen": "a-simulate",
        "b-fastgen": "b-simulate",
    }
    errors = {one.run_id: one.prediction_error for one in compared.groups}
    assert errors["a-fastgen"] == pytest.approx(0.1) and errors["b-fastgen"] == pytest.approx(-0.1)
    text = printed(tmp_path)
    assert text.index("Measured") < text.index("c-fastgen") < text.index("Simulated") < text.index("d-simulate")
    assert "110.0 +10.0%" in text and "predicted: total tok/s of the simulated run" in text
    page = tmp_path / "page.html"
    data = json.loads(printed(tmp_path, "--json", "--html", str(page)))
    found = {group["run_id"]: group["predicted_by"] for group in data["groups"]}
    assert found == beside
    content = page.read_text()
    assert '"Simulated throughput"' in content and '"title":"Throughput"' in content


def printed(results: Path, *options: str) -> str:
    done = python("-m", "harness.compare", str(results), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_under_deepspeed_the_first_rank_plays_as_many_as_there_are(harness: Harness) -> None:
    launch = {"WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    other = harness(*H100, "dataset.num_samples=4", RANK="1", LOCAL_RANK="1", **launch)
    assert (other.status, other.stdout, other.stderr) == (0, "", "")
    run = harness(*H100, "dataset.num_samples=4", RANK="0", LOCAL_RANK="0", **launch)
    assert run.status == 0, run.stderr
    assert (run.row["tp"], run.row["dp"]) == ("2", "2")
    assert run.record["split"]["why"].startswith("a rank of tp=1 needs 128.5 GiB of weights")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hardware.memory_bytes=null"], "hardware.memory_bytes: h100_80g does not say them; "),
        (["hardware.memory_bandwidth=null"], "hardware.memory_bandwidth: not known for hardware=h100_80g"),
        (["engine.max_sequences=512", "engine.kv_memory=100GiB"], "engine.kv_memory: 100GiB asks for 100.0 GiB"),
        (["engine.kv_memory=1000"], "engine.kv_memory: 1000 is 1000 bytes, less than one block of 64 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated_is_refused(words: list[str], line: str) -> None:
    catalogue.register()
    begin_anew()
    job = prepare(compose([*H100, "parallel.tp=8", *words]))
    with pytest.raises(UserError) as refused:
        catalogue.create(engine_settings(job, Rank(), None)).load()
    assert str(refused.value).startswith(line)


def test_a_refusal_is_one_line_and_a_row(harness: Harness) -> None:
    run = harness(*H100, "parallel.tp=1")
    assert run.status == 2
    assert run.stderr.startswith("error: parallel.tp: 1: a rank has 74.5 GiB on h100_80g, its weights take 128.5 GiB; ")
    assert run.stderr.count("\n") == 1 and run.row["status"] == "invalid"


def test_a_split_that_no_device_has_room_for_is_refused_at_once(tmp_path: Path) -> None:
    words = [*H100, "hardware.memory_bytes=10_000_000_000", f"results_dir={tmp_path}"]
    assert_refused(answered(*words), "error: parallel: auto: a rank of tp=1 needs 128.5 GiB of weights")
