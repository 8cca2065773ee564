"""Shared KV blocks with real kernels and in whole runs: the ids of a run without, counts that add up, forged ones."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engines import generate, hugging_face, ids, settings
from support.forgeries import Lines, Record, feed, forge, found_in
from support.late_device import Late
from support.machine import needs_native
from support.models import save_small_demo
from support.resuming import begin, finished, has_lines, kill, run_id_in, wait_for, work
from support.runs import RANDOM, TINY, Run, deepspeed, ran

from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.shared.order import Order
from harness.models.architecture import attention_heads, parameters
from harness.plan import __main__ as plan
from harness.workload.records import PassRecord, Request

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = ["hardware.peak_flops.float32=1e11", "hardware.memory_bandwidth=1e10"]
SIZES = ["engine.token_budget=64", "engine.max_sequences=6", "engine.kv_block_size=16", "engine.kv_memory=4MiB"]
SHARED = ["dataset.shared_prefix=40", "dataset.prefixes=2", "dataset.input_len=11", "dataset.output_len=7"]
WORK = [*TINY, *RANDOM, *SIZES, *SHARED, "dataset.num_samples=24"]
ON = "engine.prefix_sharing=true"
TIMES = {"started_s", "seconds"}


def alike(count: int, vocabulary: int = 300, most: int = 20, times: int = 1) -> list[Request]:
    """Returns requests that begin in one of two ways; some are the beginning alone, and one no other has.

    Args:
        times: beginnings are so many times as long, 70 tokens at most.
    """
    rng = random.Random(1)

    def some(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(length))

    stems = [some(70 * times), some(48 * times)]
    prompts = [
        rng.choice(stems)[: rng.choice([16, 40, 48, 70]) * times] + some(rng.choice([0, 1, 9])) for _ in range(count)
    ]
    return [Request(n, "", rng.randint(1, most), prompt_ids=one) for n, one in enumerate([*prompts, some(50)])]


# --- kernels ---


@pytest.mark.parametrize("kernels", [Kernels.torch, pytest.param(Kernels.native, marks=needs_native)])
@pytest.mark.parametrize(
    ("budget", "sequences", "blocks", "depth"),
    [(64, 1, 16, 0), (64, 8, 60, 0), (9, 8, 60, 1), (30, 12, 9, 0), (30, 12, 9, 1)],
    ids=str,
)
def test_ids_are_those_of_every_prompt_computed_whole(
    kernels: Kernels, budget: int, sequences: int, blocks: int, depth: int
) -> None:
    """One after another, many at a time, prompts in pieces, a cache too small for all that run, a pass ahead."""
    jobs = alike(24)
    sizes = {"token_budget": budget, "max_sequences": min(sequences, budget), "kv_block_size": 16}
    block_bytes = 2 * 3 * 2 * 16 * 16 * 4
    engine = FastGenEngine(
        settings(kernels=kernels, prefix_sharing=True, kv_memory=blocks * block_bytes, order=Order.dataset, **sizes)
    )
    engine.load()
    assert engine.total_blocks == blocks
    if depth:
        engine.runner = Late(engine.runner)
    engine.warm_up()
    for _ in range(2):  # a second run finds nothing of the first
        found = generate(engine, jobs)
        assert ids(found) == hugging_face(engine.settings.source, jobs)
        shared = engine.statistics.shared_prompt_tokens
        assert shared and shared == sum(one.shared_tokens or 0 for one in found.values())
        assert found[24].shared_tokens == 0 and found[0].shared_tokens == 0
        assert bool(engine.statistics.preemptions) == (blocks == 9)


def test_ids_of_the_triton_pass_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from support.triton_passes import dummy, settings_of

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    stem, passes = [3 + place for place in range(70)], list[PassRecord]()
    jobs = [Request(number, "", 4, prompt_ids=(*stem, 200 + number, 5, 6)) for number in range(6)]
    source, block_bytes = dummy(), 2 * 2 * 2 * 64 * 16 * 4
    chosen = settings_of(source, prefix_sharing=True, token_budget=73, max_sequences=6, kv_memory=14 * block_bytes)
    engine = FastGenEngine(chosen)
    engine.load()
    assert (engine.kernels, engine.total_blocks) == ("triton", 14)
    engine.on_pass = passes.append
    found = generate(engine, jobs)
    assert ids(found) == hugging_face(source, jobs)
    assert engine.statistics.shared_prompt_tokens == 5 * 64
    # Sequences read more blocks in a pass than there are, and its list of them has room.
    assert max(record.kv_read_tokens or 0 for record in passes) > 14 * 16


def test_deepspeeds_kernels_read_the_blocks_that_they_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    from support import ragged
    from support.deepspeed_kernels import emulate

    emulate(monkeypatch.setattr)
    directory = ragged.save(tmp_path)
    jobs = alike(8, vocabulary=320, most=6, times=4)
    runner = ragged.loaded(ragged.settings(directory, prefix_sharing=True, token_budget=200, max_sequences=4))
    found, engine = ragged.generate(runner, jobs, 64)
    assert ragged.Judge(directory).worst_gap(jobs, ids(found)) < ragged.ROUNDING["float16"]
    assert engine.statistics.shared_prompt_tokens and engine.statistics.shared_prompt_tokens % 128 == 0


# --- runs ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the run that shares nothing."""
    run = ran(tmp_path_factory.mktemp("whole"), *WORK, "engine.kernels=torch")
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the same that shares blocks."""
    run = ran(tmp_path_factory.mktemp("sharing"), *WORK, "engine.kernels=torch", ON)
    assert run.status == 0, run.stderr
    return run


@pytest.fixture
def copy(sharing: Run, tmp_path: Path) -> Path:
    shutil.copytree(sharing.results, tmp_path / "results")
    return tmp_path / "results" / sharing.directory.name


def shared_by(run: Run) -> int:
    """Returns the tokens that a run did not compute, once its record and its lines agree on them."""
    said = run.record["engine_statistics"]["shared_prompt_tokens"]
    assert said == sum(line["shared_tokens"] for line in run.completions.values())
    return int(said)


def passes_of(run: Run) -> list[dict[str, str]]:
    with open(run.directory / "passes.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def test_a_run_says_what_it_did_not_compute(whole: Run, sharing: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert sharing.token_ids == whole.token_ids
    shared = shared_by(sharing)
    assert shared > 24 * 16 and shared % 16 == 0
    for name in ("prompt_tokens", "output_tokens", "total_tokens", "completed"):
        assert sharing.row[name] == whole.row[name]
    fed = [sum(int(row["tokens"]) for row in passes_of(run)) for run in (whole, sharing)]
    assert fed[0] - fed[1] == shared
    assert int(sharing.row["steps"]) < int(whole.row["steps"])
    assert f"{shared:,} of the prompt tokens were not computed" in sharing.stdout
    assert "not computed" not in whole.stdout
    assert whole.record["engine_statistics"]["shared_prompt_tokens"] == 0
    assert all("shared_tokens" not in line for line in whole.completions.values())
    for run in (whole, sharing):
        assert found_in(run.directory, capsys) == []
    assert found_in(sharing.directory, capsys, "--against", str(whole.directory)) == []


def test_operations_that_nobody_needed_are_not_counted(whole: Run, sharing: Run) -> None:
    architecture = {**whole.record["config"]["model"]["architecture"], "vocab_size": 32000}
    heads, _, head_dim = attention_heads(architecture)
    count = parameters(architecture)
    assert count is not None
    each = [line["shared_tokens"] for line in sharing.completions.values()]
    saved = 2 * count.matmul * sum(each)
    saved += sum(4 * architecture["num_hidden_layers"] * heads * head_dim * n * (n + 1) // 2 for n in each)
    assert whole.record["model_flops"] - sharing.record["model_flops"] == saved


def more_of_one(directory: Path, record: Record, lines: Lines) -> None:
    """A request shared a block more."""
    line = next(line for line in lines if line["shared_tokens"] == 32)
    line["shared_tokens"] = 48
    record["engine_statistics"]["shared_prompt_tokens"] += 16


def unfed(directory: Path, record: Record, lines: Lines) -> None:
    """The same, and its passes fed less."""
    more_of_one(directory, record, lines)
    feed(directory, record, -16)


def sum_alone(directory: Path, record: Record, lines: Lines) -> None:
    """The record shared more than its requests."""
    record["engine_statistics"]["shared_prompt_tokens"] += 16


def all_of_it(directory: Path, record: Record, lines: Lines) -> None:
    """A prompt was shared to its last token."""
    lines[0]["shared_tokens"] = lines[0]["prompt_tokens"]


def forgotten(directory: Path, record: Record, lines: Lines) -> None:
    """What was shared is said nowhere."""
    for line in lines:
        del line["shared_tokens"]
    record["engine_statistics"]["shared_prompt_tokens"] = 0


def switched_off(directory: Path, record: Record, lines: Lines) -> None:
    """The key was not set."""
    record["config"]["engine"]["prefix_sharing"] = False


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (more_of_one, "the passes of passes.csv have "),
        (unfed, "shared_tokens is 48, but other prompts begin with 40 of its ids at most"),
        (sum_alone, "record.json says shared_prompt_tokens "),
        (all_of_it, "shared_tokens is 51 of a prompt of 51 tokens"),
        (forgotten, "shared_tokens is None of a prompt of 51 tokens"),
        (switched_off, "shared_tokens is 32, but engine.prefix_sharing is not true"),
    ],
)
def test_a_forged_count_is_found(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path, Record, Lines], None], told: str
) -> None:
    forge(copy, change)
    found = found_in(copy, capsys)
    assert any(text.startswith(told) for text in found), found


def test_two_replicas_share_each_in_a_pool_of_its_own(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ran(tmp_path, *WORK, "engine.kernels=torch", ON, "parallel.dp=2", launcher=deepspeed(2))
    assert run.status == 0, run.stderr
    assert run.row["dp"] == "2" and run.token_ids == whole.token_ids
    assert shared_by(run) > 0
    assert found_in(run.directory, capsys) == []


@pytest.mark.slow
def test_ranks_that_share_a_model_share_blocks(whole: Run, tmp_path: Path) -> None:
    run = ran(tmp_path, *WORK, "engine.kernels=torch", ON, "parallel=tp2", "verify=4")
    assert run.status == 0, run.stderr
    assert (run.row["tp"], run.row["parity_checked"], float(run.row["parity_exact_share"])) == ("2", "4", 1.0)
    assert run.token_ids == whole.token_ids and shared_by(run) > 0


@pytest.mark.slow
def test_a_resumed_run_begins_with_an_empty_pool(
    tmp_path: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 24 requests of two stems, one after another on eight layers: seconds, so that one can be killed on its way.
    words = [*work(), *RANDOM, *SHARED, "dataset.output_len=30", "engine.kv_block_size=16", ON]
    words = [word for word in words if word != "engine.max_sequences=2"] + ["engine.max_sequences=1"]
    process = begin(tmp_path, words=words)
    assert wait_for(process, lambda: has_lines(tmp_path, 4))
    kill(process, "all")
    process.wait()
    run_id, before = run_id_in(tmp_path), finished(tmp_path)
    assert 4 <= before < 24
    run = ran(tmp_path, f"resume={run_id}")
    assert run.status == 0, run.stderr
    uninterrupted = ran(tmp_path / "whole", *words, "engine.prefix_sharing=false")
    assert run.token_ids == uninterrupted.token_ids
    shared = [line["shared_tokens"] for line in run.completions.values()]
    assert shared.count(0) == 4  # of each stem the first, in both segments
    assert run.record["engine_statistics"]["shared_prompt_tokens"] < sum(shared)
    assert found_in(run.directory, capsys) == []


# --- without computing ---


def test_a_simulation_shares_what_the_real_run_does(
    sharing: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ran(tmp_path, "engine=simulate", *WORK, *FIGURES, ON)
    assert run.status == 0, run.stderr
    theirs, ours = passes_of(sharing), passes_of(run)
    for one in (*theirs, *ours):
        del one["kv_utilisation"]  # of pools of different sizes
    assert theirs == ours
    assert {index: line["shared_tokens"] for index, line in run.completions.items()} == {
        index: line["shared_tokens"] for index, line in sharing.completions.items()
    }
    assert shared_by(run) == shared_by(sharing)
    assert found_in(run.directory, capsys) == []


def test_a_simulation_shares_texts_where_it_has_their_ids(tmp_path: Path, demo_model: Path) -> None:
    stem = "You are a helpful assistant who answers in one sentence and never says more than was asked for. " * 4
    file = tmp_path / "alike.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{stem}Name {n} rivers.", "output_len": 4}) + "\n" for n in range(9))
    )
    job = ["engine=simulate", *FIGURES, "model.dtype=float32", "dataset=jsonl", f"dataset.path={file}", *SIZES, ON]
    known = ran(tmp_path / "known", *job, f"model.path={save_small_demo(tmp_path / 'model', demo_model)}")
    assert known.status == 0, known.stderr
    assert shared_by(known) >= 6 * 64
    unknown = ran(tmp_path / "unknown", *job, *TINY)
    assert unknown.status == 0, unknown.stderr
    assert shared_by(unknown) == 0
    assert any("those that are texts share no blocks" in note for note in unknown.record["notes"])


def test_what_a_plan_cannot_say_of_shared_blocks_it_does_not(sharing: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--explain", str(sharing.directory), *FIGURES]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --explain: ") and "prompt tokens that others shared" in error
    assert error.count("\n") == 1
    for words, said in (([], False), ([ON], True)):
        assert plan.main(["model=llama2_7b", "hardware=h100_80g", *words]) == 0
        assert ("engine.prefix_sharing is not planned" in capsys.readouterr().out) == said
