"""What a launcher makes of a process, and the command that starts one."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from pathlib import Path

import pytest

from harness.basics.errors import UserError
from harness.machine.memory import OomKills
from harness.ranks.rank import Rank, check_world, decoded, encoded, free_port, rank_of, without_local_rank
from harness.running.launcher import check_devices, command, describe, variables
from harness.running.watch import MAIN


def test_a_plain_process_is_no_rank() -> None:
    assert rank_of({}) is None
    assert rank_of({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_deepspeed_s_variables() -> None:
    rank = rank_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"})
    assert rank == Rank(rank=5, world=8, local_rank=1, local_world=4)
    assert not rank.first
    assert rank.several_hosts
    assert rank_of({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Rank(0, 2, 0, 2)
    variables = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert rank_of(variables) == Rank(rank=2, world=3, local_rank=0, local_world=2, host=1)


def test_a_launcher_that_numbers_no_ranks_is_refused() -> None:
    # Each process would start the ranks of a whole run.
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with pytest.raises(UserError, match=rf"^launch: {variable}=2, but no RANK: .*; start one deepspeed --no_ssh"):
            rank_of({variable: "2"})
        assert rank_of({variable: "1"}) is None
    assert rank_of({"SLURM_STEP_NUM_TASKS": "2", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Rank(1, 2, 0, 2)


def test_overrides_travel_as_one_word() -> None:
    overrides = ["dataset.path='a b,[c]*$d\\.json'", "", "--", "é漢\n", "%n", "\udcff"]
    word = encoded(overrides)
    assert re.fullmatch(r"--encoded=[A-Za-z0-9_-]+", word)
    assert decoded(["before", word, "after"]) == ["before", *overrides, "after"]
    assert decoded([encoded([])]) == []
    for broken in ("--encoded=", word[:-3], "--encoded=eyJhIjogMX0", "--encoded=WzFd", "--encoded=*"):
        with pytest.raises(UserError, match=r"^--encoded: .* is damaged; launch/multi_node.py makes it$"):
            decoded([broken])


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
    with pytest.raises(UserError, match=r"the launch has 3; give the hostfile as many slots"):
        check_world(Rank(0, 3, 0, 2), tp=2, dp=1)


def test_a_lone_rank_is_started_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(1, "cpu", ["a=b"]) == [sys.executable, "-u", str(MAIN), "a=b"]
    monkeypatch.setenv("HARNESS_RUN_ID", "another")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    told = variables(1, "cuda")
    assert rank_of(told) == Rank() and "HARNESS_RUN_ID" not in told
    assert (told["CUDA_VISIBLE_DEVICES"], told["DS_ACCELERATOR"]) == ("5", "cuda")
    assert variables(1, "cpu")["CUDA_VISIBLE_DEVICES"] == "0"
    assert rank_of(variables(2, "cpu")) is None and "CUDA_VISIBLE_DEVICES" not in variables(2, "cuda")


def devices(line: list[str]) -> dict[str, list[int | str]]:
    """Returns the hosts of a command for DeepSpeed's launcher, and the devices of each."""
    (word,) = (word for word in line if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(word.removeprefix("--world_info=")))


def test_the_command_is_deepspeed_s_launcher_with_the_overrides_untouched() -> None:
    overrides = ["dataset.path=a b,[c]*$d.json", "engine.token_budget=64"]
    line = command(3, "cpu", overrides)
    assert line[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert devices(line) == {"localhost": [0, 1, 2]}  # one machine, whatever /job/hostfile says
    assert line[-3:] == [str(MAIN), *overrides]


def test_the_command_is_the_one_that_deepspeed_s_runner_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deepspeed.launcher import runner

    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$SHOWN"\n')
    (tmp_path / "python").chmod(0o755)
    ours = command(2, "cpu", ["a=b c"])
    flags = ["--num_accelerators", "2", "--hostfile", os.devnull, "--log_level", "critical"]
    port = next(word for word in ours if word.startswith("--master_port=")).partition("=")[2]
    monkeypatch.setenv("SHOWN", str(tmp_path / "shown"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    runner.main([*flags, "--master_port", port, str(MAIN), "a=b c"])
    theirs = (tmp_path / "shown").read_text().splitlines()
    assert set(theirs) - set(ours) == {"--enable_each_rank_log=None"}  # the default
    assert set(ours) - set(theirs) == {ours[0]}


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1]),
        ("", [0, 1]),
        ("5, 3,1", [5, 3]),
        ("3", [0, 1]),
        ("GPU-12ab,GPU-34cd", ["GPU-12ab", "GPU-34cd"]),
        ("GPU-12ab, 3,7", ["GPU-12ab", 3]),
        ("MIG-12ab-34,MIG-GPU-56cd/1/0", ["MIG-12ab-34", "MIG-GPU-56cd/1/0"]),
        ("4,6,-1,5", [4, 6]),
        ("4,-1,6", [0, 1]),
    ],
)
def test_the_gpus_that_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, numbers: list[int | str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices(command(2, "cuda", [])) == {"localhost": numbers}
    assert devices(command(2, "cpu", [])) == {"localhost": [0, 1]}
    first = (visible or "").partition(",")[0]
    assert variables(1, "cuda")["CUDA_VISIBLE_DEVICES"] == (first or "0")


def test_more_ranks_than_gpus_are_refused_with_the_way_out() -> None:
    check_devices(50, 20, "cpu")  # ranks on a CPU are processes
    with pytest.raises(
        UserError, match=r"^parallel: tp=50 x dp=20 needs 1000 GPUs, this machine shows \d+; .*--hostfile"
    ):
        check_devices(50, 20, "cuda")


def test_free_ports_differ_from_the_default() -> None:
    assert free_port() not in (0, 29500)


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(-9, "signal SIGKILL"), (247, "signal SIGKILL"), (245, "signal SIGSEGV: native code crashed"), (3, "status 3")],
)
def test_how_a_launch_ended_is_said_in_words(returncode: int, words: str) -> None:
    fault = describe(returncode, OomKills(), {})
    assert (fault.status, fault.exit_status) == ("failed", 1)
    assert words in fault.error
