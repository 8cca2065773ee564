"""``parallel=auto``: the sums that decide it, and what a config becomes in launches of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from support.runs import ROOT

from harness.basics.errors import UserError
from harness.costs.memory import Memory, Needs, shortage, useful_tokens
from harness.engines.catalogue import register
from harness.machine import snapshot
from harness.ranks.rank import Rank
from harness.running import job, preflight, split
from harness.running.split import Launch, choose
from harness.workload.records import Request

GIB = 2**30
EIGHT = Launch(8, 8)
TWO_HOSTS = Launch(16, 8)
SWEEP = Launch(8, 8, fixed=False)
ALONE, ALONE_ON_GPUS = Launch(None, 1), Launch(None, 8)


def chosen(
    asked: tuple[int | None, int | None], launch: Launch, least: int = 1, heads: int = 64
) -> tuple[int, int] | str:
    """Returns the split where ``least`` ranks are what a model takes and its heads go into their divisors alone."""

    def refusal(tp: int, dp: int) -> UserError | None:
        return UserError("parallel.tp", f"{tp} does not divide its {heads} heads") if heads % tp else None

    try:
        found = choose(asked, launch, lambda tp, here: None if tp >= least else f"tp={tp} is too few", refusal)
    except UserError as error:
        return str(error)
    return found.tp, found.dp


@pytest.mark.parametrize(
    ("asked", "launch", "least", "heads", "split"),
    [
        ((None, None), EIGHT, 1, 64, (1, 8)),
        ((None, None), EIGHT, 2, 64, (2, 4)),
        ((None, None), EIGHT, 3, 64, (4, 2)),
        ((None, None), EIGHT, 8, 64, (8, 1)),
        ((None, None), Launch(6, 6), 2, 9, (3, 2)),  # two does not divide nine heads
        ((None, None), Launch(7, 7), 1, 64, (1, 7)),
        ((None, None), Launch(1, 1), 5, 64, (1, 1)),  # there is no other; the engine says what it lacks
        ((None, None), TWO_HOSTS, 1, 64, (1, 16)),
        ((None, None), TWO_HOSTS, 5, 64, (8, 2)),
        ((None, None), TWO_HOSTS, 9, 64, (16, 1)),
        ((None, None), Launch(12, 6), 4, 12, (6, 2)),  # four would lie across the hosts
        ((None, None), Launch(12, 6), 4, 4, (4, 3)),  # and do where nothing else fits
        ((None, None), ALONE, 4, 64, (1, 1)),
        ((None, None), ALONE_ON_GPUS, 1, 64, (1, 1)),
        ((None, None), ALONE_ON_GPUS, 3, 64, (4, 1)),
        ((2, None), EIGHT, 8, 64, (2, 4)),  # what is given is not questioned
        ((3, None), Launch(3, 3), 1, 64, (3, 1)),
        ((None, 2), EIGHT, 1, 64, (4, 2)),
        ((None, 8), EIGHT, 1, 64, (1, 8)),
        ((2, None), ALONE, 1, 64, (2, 1)),
        ((None, 3), ALONE, 1, 64, (1, 3)),
        ((None, 2), ALONE_ON_GPUS, 3, 64, (4, 2)),
        ((1, 1), EIGHT, 8, 64, (1, 1)),  # refused as ever, by whoever compares it with the launch
        ((None, None), SWEEP, 2, 64, (2, 4)),
        ((4, None), SWEEP, 1, 64, (4, 2)),
        ((3, None), SWEEP, 1, 64, (3, 2)),  # its jobs have launches of their own
        ((None, 1), SWEEP, 1, 64, (1, 1)),
        ((None, 2), SWEEP, 3, 64, (4, 2)),
    ],
)
def test_the_split(
    asked: tuple[int | None, int | None], launch: Launch, least: int, heads: int, split: tuple[int, int]
) -> None:
    assert chosen(asked, launch, least, heads) == split


@pytest.mark.parametrize(
    ("asked", "launch", "least", "heads", "line"),
    [
        ((None, None), EIGHT, 9, 64, "parallel: auto: tp=1 is too few; tp=8 is too few; use more ranks or"),
        ((None, None), Launch(3, 3), 2, 64, "parallel: auto: tp=1 is too few; parallel.tp=3 does not divide its 64"),
        ((3, None), EIGHT, 1, 64, "parallel.tp: 3 does not divide the 8 ranks of the launch; launch with a multiple"),
        ((None, 16), EIGHT, 1, 64, "parallel.dp: 16 does not divide the 8 ranks of the launch"),
        ((None, 2), ALONE_ON_GPUS, 5, 64, "parallel: auto: tp=1 is too few; tp=4 is too few"),
    ],
)
def test_what_cannot_be_split_is_one_line(
    asked: tuple[int | None, int | None], launch: Launch, least: int, heads: int, line: str
) -> None:
    assert str(chosen(asked, launch, least, heads)).startswith(line)


def test_shortage_counts_weights_and_cache_as_the_engines_do() -> None:
    needs = Needs(sharded=8 * GIB, whole=GIB, token=2**20, kv_heads=3, tokens=1024, part=0.5)
    assert (needs.weights(1), needs.weights(3)) == (9 * GIB, -(-8 * GIB // 3) + GIB)
    assert [needs.useful(tp) for tp in (1, 2, 3)] == [GIB // 3 * 3, GIB // 3 * 2, GIB // 3]  # whole heads
    device = Memory(12 * GIB, False, GIB)
    assert shortage(1, 8, device, needs) is None  # 2 GiB left, half of it for the cache
    assert shortage(1, 8, Memory(12 * GIB - 4, False, GIB), needs) is not None
    host = Memory(24 * GIB, True, GIB)
    assert shortage(1, 2, host, needs) is None
    line = shortage(1, 3, host, needs)
    assert line == "a rank of tp=1 needs 9.0 GiB of weights and 1.0 GiB of KV cache; it has 8.0 GiB"
    assert shortage(1, 8, Memory(None, False, 0), needs) is None
    assert shortage(1, 8, device, None) is None


def test_a_cache_of_given_bytes_is_useful_by_definition() -> None:
    needs = Needs(sharded=GIB, whole=0, token=2**20, kv_heads=1, tokens=2**20, given=64)
    assert shortage(1, 1, Memory(GIB + 64, False, 0), needs) is None
    assert shortage(1, 1, Memory(GIB + 63, False, 0), needs) is not None


def test_a_useful_cache_has_the_longest_request_and_some_more() -> None:
    requests = [Request(0, "x" * 30, 90, claimed_prompt_len=9), *(Request(i, "", 9) for i in range(1, 4))]
    assert useful_tokens(requests, None, 10**9) == 100 + 3 * 10
    many = [Request(i, "x" * 27, 90) for i in range(99)]
    assert useful_tokens(many, None, 10**9) == 8 * 100
    assert useful_tokens(many, 50, 10**9) == 8 * 50
    assert useful_tokens(many, None, 250) == 250  # what the engine never exceeds
    assert useful_tokens(many, None, 1) == 100
    assert useful_tokens([Request(0, "", None, prompt_ids=(1, 2, 3), reply="x" * 30)], None, 10**9) == 14


@pytest.fixture
def conf() -> Iterator[None]:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


SEVEN, SEVENTY = (["model=llama2_7b", "model.weights=dummy"], ["model=llama2_70b", "model.weights=dummy"])
FP6 = ["engine.quantization=wf6af16", "model.dtype=float16"]


@pytest.mark.skipif(snapshot.device_memory_bytes() is not None, reason="the GPU here has a size of its own")
@pytest.mark.parametrize(
    ("overrides", "world", "found"),
    [
        (SEVEN, 8, (1, 8)),
        # two would fit, with less cache than is useful
        ([*SEVEN, "hardware.memory_bytes=16000000000", "engine.kv_memory=0.3"], 8, (4, 2)),
        (SEVENTY, 8, (2, 4)),  # 64 GiB of weights a rank, of 74.5
        (SEVENTY, 2, (2, 1)),
        ([*SEVENTY, "engine.kv_memory=20GiB"], 8, (4, 2)),
        ([*SEVENTY, "hardware.memory_bytes=24000000000"], 8, (8, 1)),
        ([*SEVENTY, *FP6], 8, (1, 8)),
        ([*SEVENTY, "engine=ds_inference", "preflight=false"], 8, (2, 4)),  # else this host must hold 8 models
        ([*SEVENTY, "engine=mii", "model.dtype=float16"], 8, (8, 1)),
        ([*SEVEN, "engine=mii", "model.dtype=float16"], 2, (2, 1)),
        ([*SEVEN, "engine=baseline"], 8, (1, 8)),
        (SEVENTY, 6, (2, 3)),
        ([*SEVENTY, "parallel=tp8"], 8, (8, 1)),
        ([*SEVENTY, "parallel.dp=2"], 8, (4, 2)),
        (SEVENTY, 3, "auto: a rank of tp=1 needs 128.5 GiB of weights and 2.6 GiB of KV cache; it has 74.5 GiB; "),
        ([*SEVENTY, "engine=baseline"], 8, "parallel.tp=8: the baseline spreads a large model over devices"),
        ([*SEVENTY, "engine=ds_inference", "engine.cuda_graph=true"], 8, "use engine.cuda_graph=false, or "),
        (["hardware.memory_bytes=300000000"], 9, "parallel.tp=9 does not divide its 9 attention and 3 key/value heads"),
    ],
)
def test_models_on_gpus(
    conf: None,
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    world: int,
    found: tuple[int, int] | str,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    composed = compose("config", ["hardware=a100_80g", *overrides])
    if isinstance(found, str):
        with pytest.raises(UserError) as refused:
            job.prepare(composed, Rank(0, world, 0, world))
        assert found in str(refused.value)
        return
    prepared = job.prepare(composed, Rank(0, world, 0, world))
    assert (prepared.tp, prepared.dp) == found
    assert prepared.settings["parallel"] == {"tp": found[0], "dp": found[1]}


def test_sizes_that_nobody_knows_mean_whole_replicas(
    conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    family = ["model.architecture.model_type=gpt_neox"]
    prepared = job.prepare(compose("config", [*SEVENTY, *family, "engine=ds_inference"]), Rank(0, 4, 0, 4))
    assert (prepared.tp, prepared.dp, prepared.split.why) == (1, 4, split.UNKNOWN)


def test_a_default_run_is_the_job_that_it_was(conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    default, single = (job.prepare(compose("config", words)) for words in ([], ["parallel=single"]))
    assert default.job_hash == single.job_hash and default.settings == single.settings
    assert default.split.record == {
        "asked": {"tp": None, "dp": None},
        "tp": 1,
        "dp": 1,
        "why": "one rank where no launch brings more",
    }
    assert single.split.record["asked"] == {"tp": 1, "dp": 1} and not single.split.chosen


def test_a_rank_follows_the_split_of_rank_0(conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    composed, rank = compose("config", []), Rank(1, 2, 1, 2)
    assert (found := job.prepare(composed, rank)).split.chosen and (found.tp, found.dp) == (1, 2)
    followed = job.prepare(job.with_split(composed, 2, 1), rank)
    assert (followed.tp, followed.dp, followed.settings["parallel"]) == (2, 1, {"tp": 2, "dp": 1})
    assert composed.parallel == {"tp": None, "dp": None}


def test_a_rank_that_drives_a_sweep_has_its_launch_for_each_job(
    conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    splits = {
        word: job.prepare(compose("config", [word])).split
        for word in ("repeat=1", "parallel.dp=1", "parallel.dp=3", "parallel.tp=2", "parallel=single")
    }
    assert [(one.tp, one.dp) for one in splits.values()] == [(1, 2), (1, 1), (1, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize(("ranks", "most", "held"), [(1, 2, 25), (1, 64, 64), (2, 2, 25), (2, 64, 32)])
def test_a_cache_is_reckoned_to_hold_the_longest_that_run_at_a_time(
    conf: None, demo_model: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, most: int, held: int
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = ["dataset=synthetic", "dataset.prompt=random", "dataset.num_samples=5", "dataset.input_len=10"]
    words += ["dataset.output_len=7", f"engine.max_sequences={most}", f"parallel.dp={ranks}"]
    prepared = job.prepare(compose("config", words), Rank(0, ranks, 0, ranks))
    assert preflight.held_tokens(prepared) == held  # 0.8 of 16 tokens each, of two a replica, or of all five
