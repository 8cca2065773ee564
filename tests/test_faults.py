"""Runs that run out of memory, are killed, or lose a rank: each leaves a row, and says what to do about it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from support import runs
from support.hosts import NAMESPACES, NETWORK, networked
from support.resuming import watchdogs
from support.runs import BIN, RANDOM, ROOT, TINY, Run, begun, command, deepspeed, ended, ranks_of, start, variables

from harness.basics.errors import UserError
from harness.config.compose import to_config
from harness.engines.catalogue import register
from harness.machine import memory
from harness.machine.memory import OomKills
from harness.ranks.rank import Rank, free_port
from harness.ranks.rendezvous import Rendezvous
from harness.results.directory import read_record
from harness.results.recorder import RunRecorder
from harness.results.table import read_rows
from harness.running import faults, watchdog
from harness.running.job import check, resolved
from harness.running.watch import MAIN

# --- what an exception says ---


def allocated() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    return raised.value


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (MemoryError(), False),
        (OSError(errno.ENOMEM, "no room"), False),
        (RuntimeError("std::bad_alloc"), False),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), False),
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error: Last error: Failed to CUDA calloc 10485760 bytes"), True),
        (MemoryError("Insufficient memory for KV-cache"), True),  # DeepSpeed's, through MII
    ],
)
def test_out_of_memory_is_known_by_its_many_names(error: Exception, device: bool) -> None:
    fault = faults.classify(error, {}, {})
    assert (fault.status, fault.exit_status) == ("oom", 2)
    assert fault.error.startswith(f"out of memory of the {'GPU' if device else 'host'} ({type(error).__name__}")
    assert "\n" not in fault.error


def test_what_pytorch_says_itself_is_known() -> None:
    assert faults.classify(allocated(), {}, {}).error.startswith("out of memory of the host (RuntimeError: ")


def test_a_cause_is_found_behind_another_exception() -> None:
    def fail() -> None:
        try:
            raise MemoryError("at the bottom")
        except MemoryError as error:
            raise ValueError("cannot read the checkpoint") from error

    with pytest.raises(ValueError) as raised:
        fail()
    assert "at the bottom" in faults.classify(raised.value, {}, {}).error
    refusal = UserError("model.path", "cannot be read")
    refusal.__cause__ = raised.value  # as checkpoint.as_user_error() makes it
    assert faults.classify(refusal, {}, {}).status == "oom"


def test_other_failures_and_our_own_words_are_not_out_of_memory() -> None:
    assert memory.out_of_memory(UserError("dataset.path", "no such file: 'out of memory.json'")) is None
    fault = faults.classify(KeyError("memory"), {}, {})
    assert (fault.status, fault.exit_status) == ("failed", 1)
    assert fault.error == "KeyError: 'memory'; the traceback is in run.log"


# --- what to lower ---


def composed(*overrides: str) -> DictConfig:
    """Returns a config as a record has it: with numbers for what is ``auto``."""
    register()
    sizes = ["engine.token_budget=512", "engine.max_sequences=64", "engine.kv_memory=0.3"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*("" if overrides and overrides[0].startswith("engine=") else sizes), *overrides])


ADVICE = [
    ([], {"phase": "run"}, False, "try engine.token_budget=256 engine.kv_memory=0.15 (now 512, 0.3)"),
    (["parallel.dp=4"], {}, False, "try parallel.dp=2 engine.token_budget=256 engine.kv_memory=0.15 (now 4, 512, 0.3)"),
    (["engine.token_budget=100"], {}, True, "try engine.token_budget=64 engine.kv_memory=0.15 (now 100, 0.3)"),
    (
        ["engine.token_budget=64", "engine.kv_memory=3GiB"],
        {},
        True,
        "try engine.max_sequences=32 engine.token_budget=32 engine.kv_memory=1.5GiB (now 64, 64, 3GiB)",
    ),
    (["engine.kv_memory=5000000000"], {"phase": "cache"}, True, "try engine.kv_memory=2500000000 (now 5000000000)"),
    (["engine.kv_memory='0.5'"], {"phase": "cache"}, True, "try engine.kv_memory=0.25 (now 0.5)"),
    (["engine=ds_inference"], {}, True, "try engine.batch_size=8 engine.batch_tokens=16384 (now 16, 32768)"),
    (["model=llama2_70b", "parallel.tp=2"], {"phase": "load"}, True, "try parallel.tp=4 (now 2)"),
    (["model=llama2_70b", "parallel.dp=8"], {"phase": "load"}, True, "try parallel.tp=2 parallel.dp=4 (now 1, 8)"),
    (["parallel.tp=2"], {"phase": "load"}, True, "use a smaller model, or a GPU with more memory"),  # 3 heads
    (["model.dtype=float32"], {"phase": "load"}, False, "try model.dtype=bfloat16 (now float32)"),
    ([], {"phase": "load", "dtype": "float32"}, False, "try model.dtype=bfloat16 (now float32)"),
    (["engine=baseline"], {}, True, "use a smaller model, or a GPU with more memory"),
    ([], {"phase": "load"}, False, "use a smaller model, or a machine with more memory"),
]


@pytest.mark.parametrize(("overrides", "facts", "device", "words"), ADVICE)
def test_the_advice_names_settings_that_can_be_run(
    overrides: list[str], facts: dict[str, Any], device: bool, words: str
) -> None:
    assert faults.advice(resolved(composed(*overrides)), facts, device) == words
    if words.startswith("try "):
        changes = words.removeprefix("try ").partition(" (")[0].split()
        check(to_config(composed(*overrides, *changes)), "cuda" if device else "cpu")


def test_advice_without_a_config_is_general() -> None:
    assert faults.advice({}, {}, False) == "use a smaller model, or a machine with more memory"


# --- what the kernel counts ---


@pytest.mark.parametrize(
    ("cgroup", "ours", "other"),
    [
        ("0::/a/b\n", "sys/a/b/memory.events", "proc/vmstat"),
        ("0::/not/seen/here\n", "sys/memory.events", "proc/vmstat"),  # in a container
        ("4:memory:/a\n0::/\n", "sys/memory/a/memory.oom_control", "proc/vmstat"),
        ("0::/../x\n", "sys/memory.events", "sys/x/memory.events"),
        ("", "proc/vmstat", "sys/memory.events"),
        ("0::/\n", "proc/vmstat", "sys/a/memory.events"),
    ],
)
def test_a_kill_is_seen_where_our_group_is_counted(tmp_path: Path, cgroup: str, ours: str, other: str) -> None:
    def write(place: str, count: int) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(f"low 0\noom 7\noom_kill_disable 0\noom_kill {count}\noom_group_kill 0\n")

    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    write(ours, 3)
    write(other, 5)
    kills = OomKills(tmp_path / "proc", tmp_path / "sys")
    assert kills.known and not kills
    write(other, 6)
    assert not kills
    write(ours, 4)
    assert kills
    (tmp_path / ours).unlink()
    assert not kills  # another file's count says nothing


def test_where_nothing_is_counted_a_kill_may_be_anything(tmp_path: Path) -> None:
    kills = OomKills(tmp_path, tmp_path)
    assert not kills.known and not kills
    text = faults.killed("rank 0", signal.SIGKILL, kills, {}, {}).error
    assert text == "rank 0 was ended by signal SIGKILL, as the system does when memory runs out"


def test_a_plain_kill_is_told_from_one_by_the_kernel() -> None:
    fault = faults.killed("rank 0", signal.SIGKILL, OomKills(), {}, {})
    assert (fault.status, fault.exit_status) == ("failed", 1)
    assert "not because memory ran out" in fault.error
    assert "dmesg" in faults.killed("rank 0", 0, OomKills(), {}, {}).error


# --- memory that is really not there ---


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory control group of the test's own; skipped where none can be made."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"harness-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            break
        group.rmdir()
    else:
        pytest.skip("no memory control group can be made here")
    yield group
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def limit(group: Path, room: int) -> None:
    """Leaves a group ``room`` bytes beyond what it has."""
    version1 = (group / "memory.limit_in_bytes").exists()
    used = int((group / ("memory.usage_in_bytes" if version1 else "memory.current")).read_text())
    (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(used + room))


# A wide cache that fills as the outputs grow: 64 MiB each 16 passes.
GROWING = [
    *TINY,
    *RANDOM,
    *("engine.kernels=torch", "+model.architecture.head_dim=128", "model.architecture.num_attention_heads=32"),
    *("model.architecture.num_key_value_heads=32", "dataset.num_samples=64", "dataset.input_len=16"),
    *("dataset.output_len=2000", "engine.kv_memory=4GiB", "engine.kv_block_size=16"),
]


def run_out_of_memory(group: Path, results: Path, victim: int, *overrides: str, **how: Any) -> Run:
    """Starts a run inside a memory control group, and takes the room away once its clock runs.

    The kernel ends what is largest; ``victim`` is the local rank that it is told to take.
    """
    inside = ["bash", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")]
    line = command(*GROWING, *overrides, f"results_dir={results}", **how)
    process = begun([*inside, *runs.as_fork(line)])
    for _ in range(1200):
        if any(len(path.read_text().splitlines()) > 5 for path in results.glob("*/passes.csv")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (Path("/proc") / str(ranks_of(process)[victim].pid) / "oom_score_adj").write_text("1000")
    limit(group, 64 * 2**20)
    stdout, stderr = process.communicate(timeout=120)
    return Run(process.returncode, stdout, stderr, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "overrides", "who"),
    [
        ((sys.executable,), [], "rank 0"),
        (None, ["parallel.dp=2"], "rank 1 on "),
    ],
)
def test_the_kernel_s_kill_when_memory_runs_out_is_oom(
    memory_group: Path, tmp_path: Path, launcher: tuple[str, ...] | None, overrides: list[str], who: str
) -> None:
    launcher = launcher or deepspeed(2, "--log_level", "critical")
    run = run_out_of_memory(memory_group, tmp_path, len(overrides), *overrides, launcher=launcher)
    row = run.row
    assert row["status"] == "oom", run.stderr
    assert row["error"].startswith(f"out of memory of the host: the kernel ended {who}")
    first = "parallel.dp=1 " if overrides else ""
    assert f"; try {first}engine.token_budget=256 engine.kv_memory=2GiB (now" in row["error"]
    assert row["error"] in run.stderr and f"resume={row['run_id']}" in run.stderr
    assert row["load_s"] and not row["elapsed_s"]
    if launcher == (sys.executable,):
        assert run.status == -signal.SIGKILL
        assert run.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_allocation_that_fails_is_oom(harness: Callable[..., Run]) -> None:
    limited = ("bash", "-c", 'ulimit -v 8000000 && exec "$@"', "bash", sys.executable)
    run = harness(*GROWING, "engine.kv_memory=8GiB", launcher=limited)
    assert run.status == 2
    assert run.row["status"] == "oom"
    assert run.row["error"].startswith("out of memory of the host (")
    assert run.row["error"].endswith("; try engine.kv_memory=4GiB (now 8GiB)")
    assert run.stderr == f"error: {run.row['error']}\n"


# --- rank 0 killed where nobody else knows of the record ---


@pytest.mark.slow
def test_a_killed_rank_0_under_deepspeed_leaves_a_row(tmp_path: Path) -> None:
    process = start(tmp_path, "parallel.dp=2", launcher=deepspeed(2, "--log_level", "critical"), forked=True)
    ranks_of(process)[0].kill()
    status, stderr, row = ended(process, tmp_path)
    assert status in (256 - 9, 1)  # of the rank that DeepSpeed's launcher finds ended first; it keeps them in a set
    assert row["status"] == "failed"
    assert row["error"].startswith("rank 0 was ended by signal SIGKILL, and not because memory ran out")
    assert f"error: {row['error']} (what was finished is in {tmp_path}/{row['run_id']}; " in stderr
    assert "error: rank 1: another rank died: rank 0 on " in stderr
    assert read_record(tmp_path, row["run_id"])["status"] == "failed"  # type: ignore[index]
    assert not watchdogs(row["run_id"])


RANK_0 = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
from harness.results.recorder import RunRecorder
from harness.running.watchdog import watch

recorder = RunRecorder.create(sys.argv[2], "a-run", {"engine": {"name": "fastgen"}}, [])
watch(recorder.results_dir, recorder.run_id, 1.0 if sys.argv[3] == "hang" else None)
print("begun", flush=True)
if sys.argv[3] == "finish":
    recorder.finish("ok", elapsed_s=1.0)
elif sys.argv[3] == "taken over":
    recorder.note(pid=1)
elif sys.argv[3] == "grow":
    time.sleep(2)  # a real rank takes longer to need memory than the watchdog to take note of earlier kills
    kept = [bytearray(b"x" * 2**20) for _ in range(1000)]
elif sys.argv[3] == "fork":
    if os.fork() == 0:
        time.sleep(60)
elif sys.argv[3] == "hang":
    time.sleep(120)
os.kill(os.getpid(), int(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("what", "signum", "error"),
    [
        ("die", signal.SIGKILL, "rank 0 was ended by signal SIGKILL, and not because memory ran out"),
        ("die", signal.SIGSEGV, "rank 0 was ended by signal SIGSEGV: native code crashed"),
        ("fork", signal.SIGKILL, "rank 0 was ended by signal SIGKILL"),  # a child that outlives it does not matter
        ("finish", signal.SIGKILL, ""),
        ("taken over", signal.SIGKILL, None),
    ],
)
def test_the_watchdog_closes_what_is_its_own(tmp_path: Path, what: str, signum: int, error: str | None) -> None:
    words = [sys.executable, "-c", RANK_0, str(ROOT), str(tmp_path), what, str(int(signum))]
    process = subprocess.Popen(words, stdout=-1, stderr=-1, text=True, start_new_session=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "begun\n"
    deadline = time.monotonic() + 30
    # Before the process is waited for: its zombie tells.
    while watchdogs(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not watchdogs(str(tmp_path))
    process.wait()
    if what == "fork":
        os.killpg(process.pid, signal.SIGKILL)
    said = process.stderr.read()
    record = read_record(tmp_path, "a-run")
    assert record is not None
    if error is None:
        assert record["status"] == "running" and not (tmp_path / "runs.csv").exists() and not said
        return
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == record["status"] == ("failed" if error else "ok")
    assert row["error"].startswith(error)
    assert said == (f"error: {row['error']} ({faults.way_on(tmp_path / 'a-run', 'a-run')})\n" if error else "")


@pytest.mark.full
def test_the_watchdog_ends_a_rank_that_does_not_heed_its_alarm(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RANK_0, str(ROOT), str(tmp_path), "hang", "9"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "timeout"
    assert row["error"].startswith("not finished after timeout_s=1; ")
    assert done.stderr.startswith(f"error: {row['error']} (")


def test_a_signal_is_known_although_the_process_is_buried_at_once() -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, None):
        child = subprocess.Popen(["sleep", "60" if number else "0"])
        ending = watchdog.Ending(child.pid)
        if number:
            child.send_signal(number)
        child.wait()
        if number and not ending.known_afterwards:
            pytest.skip("this kernel tells nothing of a process that is gone")
        assert ending.signal() == (number or 0)


def test_the_watchdog_knows_that_memory_ran_out(memory_group: Path, tmp_path: Path) -> None:
    limit(memory_group, 200 * 2**20)
    inside = ["bash", "-c", 'echo $$ >"$0" && exec "$@"', str(memory_group / "cgroup.procs")]
    words = [*inside, sys.executable, "-c", RANK_0, str(ROOT), str(tmp_path), "grow", "0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)  # the watchdog's end is stderr's
    assert done.returncode == -signal.SIGKILL
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "oom"
    assert row["error"].startswith("out of memory of the host: the kernel ended rank 0 (SIGKILL); ")
    assert done.stderr.startswith(f"error: {row['error']} (")


def test_the_watchdog_says_what_it_can_of_a_process_that_is_gone(tmp_path: Path) -> None:
    recorder = RunRecorder.create(tmp_path, "a-run", {"engine": {"name": "fastgen"}}, [])
    gone = subprocess.Popen(["true"])
    gone.wait()
    recorder.note(pid=gone.pid)
    words = [sys.executable, ROOT / "harness" / "running" / "watchdog.py", tmp_path, "a-run", str(gone.pid)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["error"] == "rank 0 died without an error message; the system's log (dmesg) may say why"
    assert done.stderr.startswith(f"error: {row['error']} (")


# --- ranks that go, and hosts ---


def test_a_rank_s_own_words_carry_how_the_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    heard = threading.Event()
    first, second = (Rendezvous(Rank(n, 2, n, 2), failed=heard.set) for n in range(2))
    first.open()
    meeting = threading.Thread(target=second.meet, args=({},), daemon=True)
    meeting.start()
    first.meet({})
    meeting.join(20)
    second.fail("out of memory of the GPU", 2, "oom")
    assert heard.wait(20)
    assert first.failure is not None
    assert (first.failure.status, first.failure.exit_status, first.failure.died) == ("oom", 2, None)
    for end in (first, second):
        end.leave()


END = """
import os, sys, threading
root, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(place)  # another host begins in a directory of its own
sys.path.insert(0, root)
os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29777"}
from harness.ranks import rendezvous, wire
from harness.ranks.rank import Rank

wire.LOST_S = 3
gone = threading.Event()
end = rendezvous.Rendezvous(Rank(number, 2, 0, 1, host=number), failed=gone.set)
end.open()
end.meet({})
open(f"met {number}", "w").close()
gone.wait(60)
print(end.failure, flush=True)
"""
# Host b loses its network once the ranks have met.
UNPLUGGED = """
"$@" 0 >heard.0 & a=$!
on_b "$@" 1 >heard.1 & c=$!
until [ -e "met 0" ] && [ -e "met 1" ]; do sleep 0.1; done
on_b ip link set v1 down
wait $a $c
"""


def test_a_host_without_a_word_is_lost(tmp_path: Path) -> None:
    networked(tmp_path)
    words = [sys.executable, "-c", END, str(ROOT), str(tmp_path)]
    done = subprocess.run(
        [*NAMESPACES, NETWORK + UNPLUGGED, "bash", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    heard = [(tmp_path / f"heard.{number}").read_text() for number in range(2)]
    assert heard[0].startswith("lost rank 1 on nodeb: no answer for 3 s ("), done.stderr
    assert heard[1].startswith("lost rank 0 on 10.77.0.1: no answer for 3 s (")
    assert all(line.endswith("); its host or the network is down\n") for line in heard)


@pytest.mark.endurance
def test_a_run_that_loses_a_host_ends(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    if not scale(0, 1):
        pytest.skip("half a minute of silence: with --full")
    networked(tmp_path)
    (tmp_path / "hostfile").write_text("nodea slots=1\nnodeb slots=1\n")
    flags = ["--hostfile", tmp_path / "hostfile", "--no_ssh", "--master_addr", "nodea", "--log_level", "critical"]
    job = [*TINY, *RANDOM, "dataset.num_samples=20000", "dataset.input_len=16", "dataset.output_len=80"]
    script = """
"$@" --node_rank 0 $JOB & a=$!
on_b "$@" --node_rank 1 $JOB & c=$!
until [ -s $PWD/results/*/completions.jsonl ]; do sleep 0.2; done
on_b ip link set v1 down
started=$SECONDS
wait $a; echo "status $?, $((SECONDS - started)) s"
wait $c
"""
    script = NETWORK.replace("set -euo", "set -uo") + script
    done = subprocess.run(
        [*NAMESPACES, script, "bash", str(BIN / "deepspeed"), *map(str, flags)],
        cwd=tmp_path,
        env=variables(JOB=" ".join([str(MAIN), *job, "parallel.dp=2", f"results_dir={tmp_path / 'results'}"])),
        capture_output=True,
        text=True,
        timeout=240,
    )
    run = Run(done.returncode, done.stdout, done.stderr, tmp_path / "results")
    assert run.row["status"] == "failed", done.stderr
    assert run.row["error"].startswith("lost rank 1 on nodeb: no answer for 30 s (")
    assert f"error: {run.row['error']} (what was finished is in {run.results}/" in done.stderr
    assert "error: rank 1: lost rank 0 on nodea: no answer for 30 s (" in done.stderr
    assert int(run.row["completed"]) == len(run.completions) > 0
    print(done.stdout)
