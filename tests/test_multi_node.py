"""Runs over several hosts, for real: two launchers that know nothing of each other, on two loopback addresses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.hosts import NAMESPACES, NETWORK
from support.runs import (
    BIN,
    RANDOM,
    ROOT,
    TINY,
    Run,
    assert_refused,
    begun,
    check_against_ids,
    python,
    ranks_of,
    variables,
    wait_until_begun,
)

from harness.ranks.rank import decoded, encoded, free_port
from harness.results.completions import read_completions
from harness.results.table import read_rows
from harness.running.launcher import command
from harness.running.watch import MAIN

HOSTS = ("127.0.0.1", "127.0.0.2")
# Everything that a shell, pdsh or Hydra might take for its own.
ODD_NAME = 'a b,[c]*{d}$HOME;&é%h`id`"q".json'
ODD = [
    "x=[a,b]",
    "*",
    "$HOME",
    "${x}",
    's"s',
    "q'q",
    "b\\s",
    "é漢",
    "`id`",
    "%n%%",
    "",
    "--",
    "a;b&c|d>e",
    "~",
    "new\nline",
]
SMALL = [*RANDOM, "dataset.num_samples=40", "dataset.input_len=30", "dataset.output_len=12", "engine.max_sequences=4"]
FEW = [
    "engine.max_sequences=4",
    "engine.token_budget=16",
]  # at a time, so that neither replica takes all of a few requests


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The launchers of one run, rank 0's first, and where that one leaves its results."""

    launchers: list[subprocess.Popen[str]]
    results: Path

    def end(self) -> list[Run]:
        """Waits for both, and returns how each ended."""
        runs = []
        for launcher, place in zip(self.launchers, (self.results, self.results / "of no other host"), strict=True):
            stdout, stderr = launcher.communicate(timeout=300)
            runs.append(Run(launcher.returncode, stdout, stderr, place))
        return runs


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Hosts]:
    """Returns a function that starts a run on two hosts, each by its own ``deepspeed --no_ssh``."""

    def begin(*overrides: str, directories: tuple[Path, Path] = (ROOT, ROOT), forked: bool = False) -> Hosts:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
        port = free_port()
        launchers = []
        for number, directory in enumerate(directories):
            flags = ["--hostfile", hostfile, "--no_ssh", "--node_rank", number, "--master_addr", HOSTS[0]]
            line = [BIN / "deepspeed", *flags, "--master_port", port, "--log_level", "critical", MAIN, *overrides]
            # Every host has a disk of its own.
            line.append(f"results_dir={tmp_path / ('results' if number == 0 else 'elsewhere')}")
            launchers.append(begun([str(part) for part in line], directory, forked=forked))
        return Hosts(launchers, tmp_path / "results")

    return begin


def odd_dataset(directory: Path) -> str:
    """Writes a dataset whose name needs all quoting there is, and returns the override that names it."""
    path = directory / ODD_NAME
    path.write_text(json.dumps([["ab" * n, 2 * n + 1, 60] for n in range(1, 21)]))
    return f"dataset.path='{path}'"


def check_shared(run: Run, requests: int) -> None:
    """Checks that one row, one record and all completions are there, and that both ranks had a part in them."""
    assert run.status == 0, run.stderr
    assert (run.row["status"], run.row["dp"], run.row["completed"]) == ("ok", "2", str(requests))
    assert sorted(run.completions) == list(range(requests))  # each once, or Run would have said so
    check_against_ids(run)
    passes = (run.directory / "passes.csv").read_text().count("\n") - 1
    assert 0 < passes < int(run.row["steps"])  # rank 0's, of all
    assert [path.name for path in run.results.glob("[!.]*/") if path.is_dir()] == [run.row["run_id"]]


def test_two_hosts_share_one_run(start: Callable[..., Hosts], tmp_path: Path) -> None:
    override = odd_dataset(tmp_path)
    first, second = start(*TINY, "dataset=asc24", override, *FEW).end()
    assert second.status == 0, second.stderr
    check_shared(first, 20)
    assert first.record["split"]["asked"] == {"tp": None, "dp": None}  # all ranks of all hosts were split
    assert [host["samples"] >= 2 for host in first.record["telemetry"]["hosts"]] == [True, True]
    assert override in first.record["command_line"]
    assert {n: line["prompt_tokens"] for n, line in first.completions.items()} == {n: 2 * n + 3 for n in range(20)}
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_a_host_without_the_dataset_ends_the_run_in_its_own_words(start: Callable[..., Hosts], tmp_path: Path) -> None:
    directories = (tmp_path / "0", tmp_path / "1")
    for directory in directories:
        directory.mkdir()
    (tmp_path / "0" / "data.json").write_text('[["ab", 3, 4]]')
    job = [*TINY, "parallel.dp=2", "dataset=asc24", "dataset.path=data.json"]
    first, second = start(*job, directories=directories, forked=True).end()
    words = "dataset.path: no such file: 'data.json'"
    assert (first.status, second.status) == (2, 2)
    assert words in second.stderr
    assert first.row["status"] == "invalid"
    assert first.row["error"].startswith("rank 1 on ")
    assert words in first.row["error"]
    assert first.row["error"] in first.stderr
    assert "Traceback" not in first.stderr + second.stderr


@pytest.mark.slow
def test_a_rank_that_dies_on_another_host_ends_the_run(start: Callable[..., Hosts]) -> None:
    job = ["dataset.num_samples=20000", "dataset.input_len=16", "dataset.output_len=16"]
    hosts = start(*TINY, *RANDOM, *job, "parallel.dp=2", forked=True)
    wait_until_begun(hosts.results, *hosts.launchers)
    (rank,) = ranks_of(hosts.launchers[1])
    rank.kill()
    first, second = hosts.end()
    assert first.status == 1
    assert second.status == 256 - 9
    (row,) = read_rows(hosts.results / "runs.csv")
    assert row["status"] == "failed"
    assert row["error"].startswith("another rank died: rank 1 on ")
    assert len(read_completions(first.directory / "completions.jsonl")) == int(row["completed"]) > 0
    assert "Traceback" not in first.stderr


# --- arguments ---

SHOW = "import json, sys; print('ARGUMENTS' + json.dumps(sys.argv[1:]))"


def through_pdsh(script: Path, arguments: list[str]) -> list[str]:
    """Returns what a script receives as its arguments when DeepSpeed sends them to a host by pdsh.

    DeepSpeed's own class makes the command; as pdsh does, its words are joined, ``%`` sequences are replaced, and
    the other host's shell reads the line.
    """
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import encode_world_info, parse_args

    hosts = {host: [0] for host in HOSTS}
    flags = ["--master_addr", HOSTS[0], "--master_port", str(free_port()), "--no_local_rank"]
    args = parse_args([*flags, str(script), *arguments])
    line, _, _ = PDSHRunner(args, encode_world_info(hosts)).get_cmd(variables(), hosts)
    command = " ".join(line[line.index("-w") + 2 :])
    command = re.sub("%[hn%]", lambda found: {"%h": HOSTS[0], "%n": "0", "%%": "%"}[found[0]], command)
    done = subprocess.run(
        ["bash", "-c", command], env=variables(), cwd=script.parent, capture_output=True, text=True, timeout=60
    )
    (shown,) = [text for text in done.stdout.splitlines() if text.startswith("ARGUMENTS")]
    return json.loads(shown.removeprefix("ARGUMENTS"))


def test_pdsh_damages_plain_arguments_but_not_the_encoded_word(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    word = encoded(ODD)
    received = through_pdsh(script, ["engine.token_budget=64", "x=$HOME", "y='a,b'", "100%n", word])
    assert received == ["engine.token_budget=64", f"x={os.environ['HOME']}", "y=a,b", "1000", word]
    assert decoded(received[-1:]) == ODD


def test_deepspeed_on_one_host_passes_arguments_as_they_are(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    line = [str(script) if word == str(MAIN) else word for word in command(2, "cpu", ODD)]
    done = python(*line[line.index("-u") + 1 :])
    received = sorted(json.loads(shown) for shown in done.stdout.split("ARGUMENTS")[1:])
    assert received == [["--local_rank=0", *ODD], ["--local_rank=1", *ODD]], done.stderr


def test_hydra_hands_overrides_to_our_own_launcher_as_they_are(tmp_path: Path) -> None:
    overrides = [f"dataset.path='{tmp_path / ODD_NAME}'", "+model.architecture.rope={a: [1, 2]}", "results_dir=x\\y"]
    done = python(str(MAIN), *overrides, "--cfg", "hydra", "-p", "hydra.overrides.task")
    assert yaml.safe_load(done.stdout) == overrides, done.stderr


# --- pdsh and Slurm, with stand-ins for what is not installed here ---

# Ends with the worst status of what it started.
WAIT = """status=0
while true; do
  wait -n; code=$?
  [ $code = 127 ] && exit $status
  [ $code -gt $status ] && status=$code
done
"""
# The words joined, %n replaced, and a shell on the other side that knows nothing of this one's variables; its Python is
# one of the test's choice.
PDSH = (
    """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  case $1 in
    -w) IFS=, read -ra hosts <<<"$2"; shift 2 ;;
    -f) shift 2 ;;
    *) shift ;;
  esac
done
command=${*//$OURS/$THEIRS}
for n in "${!hosts[@]}"; do
  line=${command//%n/$n}
  env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "${line//%%/%}" &
done
"""
    + WAIT
)
SRUN = (
    """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for n in 0 1; do SLURM_NODEID=$n SLURM_STEP_NUM_TASKS=2 "$@" & done
"""
    + WAIT
)
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames 127.0.0.[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def stand_ins(directory: Path, **scripts: str) -> str:
    """Writes commands into a directory of their own; returns a PATH that finds them first."""
    place = directory / "bin"
    place.mkdir()
    for name, text in scripts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return f"{place}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_multi_node_py_takes_arguments_and_variables_through_pdsh(tmp_path: Path, quick_python: str) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    flags = ["--hostfile", hostfile, "--no_ssh_check", "--master_addr", "127.0.0.1", "--log_level", "critical"]
    job = [*TINY, "parallel.dp=2", "dataset=asc24", odd_dataset(tmp_path), *FEW]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "multi_node.py", *flags, "--", *job, f"results_dir={tmp_path / 'results'}"],
        cwd=ROOT,
        env=variables(
            PATH=stand_ins(tmp_path, pdsh=PDSH),
            OURS=sys.executable,
            THEIRS=quick_python,
            OMP_NUM_THREADS="1",
            TORCH_ODD='a "b" $c `d` \\e',
        ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    run = Run(done.returncode, done.stdout, done.stderr, tmp_path / "results")
    check_shared(run, 20)
    assert run.record["config"]["dataset"]["path"] == str(tmp_path / ODD_NAME)
    assert run.record["environment"]["env"]["OMP_NUM_THREADS"] == "1"
    assert run.record["environment"]["env"]["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--hostfile", "nowhere", "--"], "error: --hostfile: no such file: 'nowhere'; "),
        (["--"], "error: --hostfile: not given; "),
        (["parallel.dp=2"], "error: command line: no -- between "),
        (["--hostfile={hostfile}", "--"], "error: --launcher: pdsh is not installed on this host; "),
        (["--hostfile={hostfile}", "--launcher=openmpi", "--", "-m"], "error: --multirun: "),
    ],
)
def test_what_multi_node_py_refuses_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\n")
    line_of_words = [argument.format(hostfile=tmp_path / "hostfile") for argument in arguments]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "multi_node.py", *line_of_words],
        cwd=ROOT,
        env=variables(PATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(done, line)


@pytest.mark.slow
def test_the_slurm_file_starts_one_run_on_two_nodes(tmp_path: Path, quick_python: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)
    copy = tmp_path / "slurm_script"  # Slurm runs a copy, in a directory of its own
    shutil.copy(ROOT / "launch" / "slurm.sbatch", copy)
    job = [*TINY, "parallel.dp=2", "dataset=asc24", odd_dataset(tmp_path), *FEW]
    done = subprocess.run(
        ["bash", copy, *job, f"results_dir={tmp_path / 'results'}"],
        cwd=tmp_path,
        env=variables(
            PATH=stand_ins(tmp_path, srun=SRUN, scontrol=SCONTROL),
            PYTHON=quick_python,
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID=str(free_port()),
            SLURM_JOB_NODELIST="127.0.0.[1-2]",
        ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    run = Run(done.returncode, done.stdout, done.stderr, tmp_path / "results")
    check_shared(run, 20)
    assert run.record["config"]["dataset"]["path"] == str(tmp_path / ODD_NAME)


@pytest.mark.slow
def test_two_hosts_that_name_themselves_by_a_loopback_address(tmp_path: Path, quick_python: str) -> None:
    probe = subprocess.run([*NAMESPACES, NETWORK], cwd=tmp_path, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")
    (tmp_path / "hostfile").write_text("nodea slots=1\nnodeb slots=1\n")
    flags = ["--hostfile", tmp_path / "hostfile", "--no_ssh", "--master_addr", "nodea", "--log_level", "critical"]
    job = [*TINY, *SMALL, "parallel.dp=2", f"results_dir={tmp_path / 'results'}"]
    done = subprocess.run(
        [*NAMESPACES, NETWORK + '"$@" --node_rank 0 $JOB & a=$!; on_b "$@" --node_rank 1 $JOB; wait $a', "bash"]
        + [str(part) for part in (quick_python, BIN / "deepspeed", *flags)],
        cwd=tmp_path,
        env=variables(JOB=" ".join([str(MAIN), *job])),
        capture_output=True,
        text=True,
        timeout=120,
    )
    check_shared(Run(done.returncode, done.stdout, done.stderr, tmp_path / "results"), 40)
