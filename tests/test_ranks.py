"""What a launcher makes of a process, and the command that starts one."""

from __future__ import annotations

import sys

import pytest

from harness.errors import UserError
from harness.launcher import MAIN, command, describe, free_port
from harness.ranks import Rank, check_world, rank_of, without_local_rank


def test_a_plain_process_is_no_rank() -> None:
    assert rank_of({}) is None
    assert rank_of({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_deepspeed_s_variables() -> None:
    rank = rank_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"})
    assert rank == Rank(rank=5, world=8, local_rank=1, local_world=4)
    assert not rank.first
    assert rank_of({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Rank(0, 2, 0, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--local_rank=0", "engine=fastgen"],
        ["--local-rank=3", "engine=fastgen"],
        ["--local_rank", "0", "engine=fastgen"],
        ["engine=fastgen"],
    ],
)
def test_local_rank_is_taken_out_of_the_command_line(arguments: list[str]) -> None:
    assert without_local_rank(arguments) == ["engine=fastgen"]


def test_the_launch_must_have_tp_times_dp_ranks() -> None:
    check_world(Rank(0, 6, 0, 6), tp=3, dp=2)
    with pytest.raises(UserError, match=r"^parallel: tp=1 x dp=2 needs 2 ranks, the launch has 3"):
        check_world(Rank(0, 3, 0, 3), tp=1, dp=2)


def test_the_command_is_deepspeed_s_launcher_with_the_overrides_untouched() -> None:
    overrides = ["dataset.path=a b,[c]*$d.json", "engine.token_budget=64"]
    line = command(3, "cpu", overrides)
    assert line[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert line[3:5] == ["--num_accelerators", "3"]
    assert line[-3:] == [str(MAIN), *overrides]
    assert command(2, "cuda", [])[3:5] == ["--num_gpus", "2"]


def test_free_ports_differ_from_the_default() -> None:
    assert free_port() not in (0, 29500)


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(-9, "SIGKILL"), (247, "SIGKILL, as the system does when memory runs out"), (245, "SIGSEGV"), (3, "status 3")],
)
def test_how_a_launch_ended_is_said_in_words(returncode: int, words: str) -> None:
    assert words in describe(returncode)
