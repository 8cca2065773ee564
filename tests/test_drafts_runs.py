"""Drafts in whole runs: the ids of a run without, counts that add up, forged ones, and what has no drafts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forgeries import Lines, Record, forge, found_in, table
from support.resuming import begin, finished, has_lines, kill, run_id_in, wait_for, work
from support.runs import RANDOM, TINY, Run, deepspeed, ran

from harness.plan import __main__ as plan
from harness.results.passes import pass_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = ["hardware.peak_flops.float32=1e11", "hardware.memory_bandwidth=1e10"]
SIZES = ["engine.token_budget=64", "engine.max_sequences=6", "engine.kv_block_size=16", "engine.kv_memory=4MiB"]
# Long outputs of made-up weights with few ids go round in circles.
LENGTHS = [
    "dataset.input_len=11",
    "dataset.output_len=60",
    "dataset.num_samples=16",
    "model.architecture.vocab_size=300",
]
WORK = [*TINY, *RANDOM, *SIZES, *LENGTHS, "engine.kernels=torch"]
ON = "engine.draft=lookup"
COUNTS = ("draft_tokens", "accepted_draft_tokens")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the run that drafts nothing."""
    run = ran(tmp_path_factory.mktemp("whole"), *WORK)
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns the same that drafts."""
    run = ran(tmp_path_factory.mktemp("drafting"), *WORK, ON)
    assert run.status == 0, run.stderr
    return run


@pytest.fixture
def copy(drafting: Run, tmp_path: Path) -> Path:
    shutil.copytree(drafting.results, tmp_path / "results")
    return tmp_path / "results" / drafting.directory.name


def counted(run: Run) -> tuple[int, int]:
    """Returns the drafts of a run, and how many of them held, once record, row and statistics agree on them."""
    drafted, accepted = (int(run.row[name]) for name in COUNTS)
    for said in (run.record, run.record["engine_statistics"]):
        assert [said[name] for name in COUNTS] == [drafted, accepted]
    return drafted, accepted


def fed(run: Run, *names: str) -> list[int]:
    """Returns the sums of columns of a run's passes."""
    return [int(sum(column)) for column in zip(*pass_rows(run.directory / "passes.csv", *names), strict=True)]


def test_a_run_says_what_it_drafted(whole: Run, drafting: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert drafting.token_ids == whole.token_ids
    drafted, accepted = counted(drafting)
    assert drafted > accepted > 0 and counted(whole) == (0, 0)
    for name in ("prompt_tokens", "output_tokens", "total_tokens", "completed"):
        assert drafting.row[name] == whole.row[name]
    assert drafting.record["model_flops"] == whole.record["model_flops"]  # of what the requests need
    columns = ("tokens", "decode_tokens", "logit_rows", "draft_tokens")
    theirs, ours = fed(whole, *columns), fed(drafting, *columns)
    wasted = drafted - accepted
    assert [one - other for one, other in zip(ours, theirs, strict=True)] == [wasted, wasted, wasted, drafted]
    assert f"{accepted:,} of the output tokens were drafted; {drafted:,} drafts were computed" in " ".join(
        drafting.stdout.split()
    )
    assert "drafted" not in whole.stdout
    for run in (whole, drafting):
        assert found_in(run.directory, capsys) == []
    assert found_in(drafting.directory, capsys, "--against", str(whole.directory)) == []


def more_held(directory: Path, record: Record, lines: Lines) -> None:
    """More of the drafts held than did."""
    record["accepted_draft_tokens"] += 1


def all_held(directory: Path, record: Record, lines: Lines) -> None:
    """More drafts held than there were."""
    record["accepted_draft_tokens"] = record["draft_tokens"] + 1


def more_drafted(directory: Path, record: Record, lines: Lines) -> None:
    """There were more drafts, all of which held."""
    for name in COUNTS:
        record[name] += 3


def passes_too(directory: Path, record: Record, lines: Lines) -> None:
    """The last pass says so too, and holds no more."""
    record["draft_tokens"] += 3

    def change(row: dict[str, str]) -> None:
        row["draft_tokens"] = str(int(row["draft_tokens"]) + 3)

    table(directory / "passes.csv", change, slice(-1, None))


def switched_off(directory: Path, record: Record, lines: Lines) -> None:
    """The key was not set."""
    record["config"]["engine"]["draft"] = None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (more_held, "the passes of passes.csv have "),
        (all_held, "record.json says that "),
        (more_drafted, "record.json says draft_tokens "),
        (passes_too, "the passes of passes.csv have "),
        (switched_off, "record.json says draft_tokens "),
    ],
)
def test_a_forged_count_is_found(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path, Record, Lines], None], told: str
) -> None:
    forge(copy, change)
    found = found_in(copy, capsys)
    assert any(text.startswith(told) for text in found), found


def test_two_replicas_draft_each_for_itself(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ran(tmp_path, *WORK, ON, "parallel.dp=2", launcher=deepspeed(2))
    assert run.status == 0, run.stderr
    assert run.row["dp"] == "2" and run.token_ids == whole.token_ids
    drafted, accepted = counted(run)
    assert drafted >= accepted > 0
    assert found_in(run.directory, capsys) == []


@pytest.mark.slow
def test_ranks_that_share_a_model_draft_together(whole: Run, tmp_path: Path) -> None:
    run = ran(tmp_path, *WORK, ON, "parallel=tp2", "verify=4")
    assert run.status == 0, run.stderr
    assert (run.row["tp"], run.row["parity_checked"], float(run.row["parity_exact_share"])) == ("2", "4", 1.0)
    assert run.token_ids == whole.token_ids and counted(run)[1] > 0


@pytest.mark.slow
def test_the_drafts_of_a_resumed_run_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*work(), *RANDOM, "dataset.input_len=11", "dataset.output_len=60", ON]
    process = begin(tmp_path, words=words)
    assert wait_for(process, lambda: has_lines(tmp_path, 4))
    kill(process, "all")
    process.wait()
    assert 4 <= finished(tmp_path) < 24
    run = ran(tmp_path, f"resume={run_id_in(tmp_path)}", "engine.draft=null")
    assert run.status == 0, run.stderr
    uninterrupted = ran(tmp_path / "whole", *words, "engine.draft=null")
    assert run.token_ids == uninterrupted.token_ids
    # Nobody wrote down what the segment had drafted that was killed.
    assert [run.row[name] for name in COUNTS] == ["", ""]
    assert found_in(run.directory, capsys) == []


# --- without drafts ---


def test_neither_plan_nor_fit_takes_a_run_with_drafts(drafting: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--explain", "--fit"):
        assert plan.main([option, str(drafting.directory), *FIGURES]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {option}: ") and "give a run with engine.draft=null" in error
        assert error.count("\n") == 1
    for words, said in (([], False), ([ON], True)):
        assert plan.main(["model=llama2_7b", "hardware=h100_80g", "engine.kernels=torch", *words]) == 0
        assert ("engine.draft is not planned" in capsys.readouterr().out) == said


def test_a_simulation_has_no_drafts(tmp_path: Path) -> None:
    run = ran(tmp_path, "engine=simulate", *TINY, *RANDOM, *LENGTHS, *FIGURES, ON)
    assert run.status == 2
    assert "engine.draft" in run.stderr and run.stderr.count("\n") == 1
