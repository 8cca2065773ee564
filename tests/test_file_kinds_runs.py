"""The same 50 prompts through each kind of file: the same tokens, in runs that can be verified."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.file_kinds import KINDS, prompts, written
from support.runs import TINY, Run, python, ran

OTHERS = [name for name in KINDS if name != "data.json"]


def run_of(directory: Path, name: str) -> Run:
    kind = KINDS[name]
    words = [*TINY, f"dataset={kind.option}", f"dataset.path={written(directory, name, prompts(50, one_line=True))}"]
    words += [] if kind.lengths else ["dataset.output_len=4"]
    run = ran(directory / "results", *words, "generation.max_output_len=4")
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def of_asc24(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Returns what the challenge's own file gives, by index."""
    return run_of(tmp_path_factory.mktemp("asc24"), "data.json").token_ids


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "saved")) for name in OTHERS])
def test_every_kind_of_file_gives_the_tokens_of_asc24(
    tmp_path: Path, name: str, of_asc24: dict[int, list[int]]
) -> None:
    run = run_of(tmp_path, name)
    assert run.token_ids == of_asc24 and len(of_asc24) == 50
    assert run.record["dataset_sha256"] and run.row["dataset"] == KINDS[name].option
    ids = {line.get("id") for line in run.completions.values()}
    assert ids == ({one.id for one in prompts(50)} if KINDS[name].ids else {None})
    verified = python("-m", "harness.verify", str(run.directory))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "50 requests" in verified.stdout
