"""engine.token_budget=auto and engine.max_sequences=auto: what becomes of them, by device, model and dataset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.basics.errors import UserError
from harness.config.compose import compose
from harness.config.identity import config_hash
from harness.costs import pass_sizes
from harness.costs.pass_sizes import PassSizes
from harness.engines import catalogue
from harness.plan.__main__ import main as plan
from harness.running import job as jobs
from harness.running import launcher
from harness.running.job import Job

GIB = 2**30
SYNTHETIC = ("dataset=synthetic", "dataset.num_samples=100", "dataset.input_len=300", "dataset.output_len=200")


def prepared(*words: str) -> Job:
    catalogue.register()
    return jobs.prepare(compose([*SYNTHETIC, *words]))


def simulated(*words: str) -> Job:
    return prepared("engine=simulate", *words)


def numbers(job: Job) -> tuple[int, int]:
    return job.settings["engine"]["token_budget"], job.settings["engine"]["max_sequences"]


def test_a_cpu_has_what_was_measured_there() -> None:
    job = simulated("model=llama2_7b", "hardware=cpu", "hardware.memory_bytes=64000000000")
    assert numbers(job) == (512, 64)
    assert (job.config.engine.token_budget, job.config.engine.max_sequences) == (512, 64)  # type: ignore[attr-defined]
    assert job.choices["sizes"]["asked"] == {"token_budget": None, "max_sequences": None}


def test_identity_is_that_of_the_numbers() -> None:
    words = ("model=llama2_7b", "hardware=cpu", "hardware.memory_bytes=64000000000")
    open_, given_ = simulated(*words), simulated(*words, "engine.token_budget=512", "engine.max_sequences=64")
    assert open_.job_hash == given_.job_hash and config_hash(open_.settings) == config_hash(given_.settings)
    assert given_.sizes is None and "sizes" not in given_.choices


@pytest.mark.parametrize(
    ("hardware", "tp", "budget", "sequences"),
    [
        ("h100_80g", 4, 4096, 256),  # 295 tokens to the knee; 70B leaves room for few
        ("a100_80g", 4, 2048, 256),
        ("b200_180g", 8, 4096, 1024),
    ],
)
def test_a_data_center_gpu(hardware: str, tp: int, budget: int, sequences: int) -> None:
    words = ("model=llama2_70b", f"hardware={hardware}", f"parallel.tp={tp}", "parallel.dp=1", "engine.kv_memory=0.9")
    job = simulated(*words)
    assert job.sizes is not None and numbers(job)[0] == budget
    assert 256 <= numbers(job)[1] <= 1024 and numbers(job)[1] >= sequences, job.sizes
    assert "KV cache holds about" in job.sizes.why


def test_ranks_are_told_the_numbers() -> None:
    job = simulated("model=llama2_7b", "hardware=h100_80g")
    sizes = {"token_budget": numbers(job)[0], "max_sequences": numbers(job)[1], "kv_memory": 0.9}
    assert {f"engine.{key}={size}" for key, size in sizes.items()} <= set(launcher.split_words(job))


@given(
    asked=st.tuples(st.none() | st.integers(1, 20000), st.none() | st.integers(1, 20000)),
    accelerator=st.sampled_from(["cpu", "cuda"]),
    memory=st.none() | st.integers(GIB, 300 * GIB),
    knee=st.none() | st.floats(1, 5000),
    fitting=st.none() | st.floats(0, 1e6),
)
def test_what_is_given_stays_and_the_other_follows(
    asked: tuple[int | None, int | None],
    accelerator: str,
    memory: int | None,
    knee: float | None,
    fitting: float | None,
) -> None:
    found = pass_sizes.choose(asked, accelerator, memory, knee, fitting)
    assert asked[0] in (None, found.token_budget) and asked[1] in (None, found.max_sequences)
    if None in asked:
        assert 1 <= found.max_sequences <= found.token_budget
    if asked == (None, None) and accelerator == "cuda":
        budgets, counts = pass_sizes.LARGE if (memory or 0) >= pass_sizes.LARGE_CARD else pass_sizes.SMALL
        assert budgets[0] <= found.token_budget <= budgets[1] and counts[0] <= found.max_sequences <= counts[1]


def test_what_limits_a_size_is_said() -> None:
    found = pass_sizes.choose((None, None), "cuda", 80 * GIB, 295.2, 71.0)
    assert (found.token_budget, found.max_sequences) == (4096, 256)
    assert found.why == (
        "a GPU of 80.0 GiB, its products bound a pass from 295 tokens on, "
        "the KV cache holds about 71 sequences of the dataset's mean length (256 is the least)"
    )
    found = pass_sizes.choose((None, None), "cuda", 12 * GIB, None, 9e9)
    assert (found.token_budget, found.max_sequences) == (512, 256)
    assert found.why.endswith("mean length (256 is the most)")


def test_one_of_them_given() -> None:
    def sizes(*asked: int | None) -> PassSizes:
        return pass_sizes.choose((asked[0], asked[1]), "cpu", None, None, None)

    assert (sizes(32, None).token_budget, sizes(32, None).max_sequences) == (32, 32)
    assert (sizes(None, 600).token_budget, sizes(None, 600).max_sequences) == (600, 600)
    assert (sizes(None, 16).token_budget, sizes(None, 16).max_sequences) == (512, 16)


@pytest.mark.parametrize(
    ("words", "field", "found"),
    [
        (["engine.token_budget=autoo"], "engine.token_budget", "'autoo'"),
        (["engine.max_sequences=1.5"], "engine.max_sequences", "1.5"),
        (["engine.max_sequences=null"], "engine.max_sequences", "None"),
        (["engine.token_budget=true"], "engine.token_budget", "True"),
        (["engine.token_budget=[1,2]"], "engine.token_budget", "[1, 2]"),
        (["engine.token_budget=0"], "engine.token_budget", "0"),
        (["engine.token_budget=32", "engine.max_sequences=64"], "engine.token_budget", "32 is below"),
    ],
)
def test_refused_in_one_line(words: list[str], field: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        prepared(*words)
    assert error.value.field == field and found in error.value.found


def test_a_plan_has_the_sizes_of_each_split(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_70b", "hardware=h100_80g", *SYNTHETIC]
    assert plan(["parallel.tp=4", "engine.kv_memory=0.9", *words]) == 0
    four = capsys.readouterr().out
    assert plan(["parallel.tp=8", "engine.kv_memory=0.9", *words]) == 0
    eight = capsys.readouterr().out
    assert "Chosen: engine.token_budget=4096, engine.max_sequences=" in four
    assert four.split("Chosen:")[1] != eight.split("Chosen:")[1]
