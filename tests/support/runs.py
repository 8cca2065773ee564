"""Whole runs as a user starts them: the command lines, what they leave behind, and their processes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.results.completions import read_completions
from harness.results.table import read_rows
from support import warm

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
ABSENT = Path(__file__).resolve().parent / "absent"
SAMPLE = ROOT / "harness" / "workload" / "data" / "sample.jsonl"


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished command and what it left behind."""

    status: int
    stdout: str
    stderr: str
    results: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        return read_rows(self.results / "runs.csv")

    @property
    def row(self) -> dict[str, str]:
        assert len(self.rows) == 1, self.stderr
        return self.rows[0]

    @property
    def directory(self) -> Path:
        return self.results / self.row["run_id"]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.directory / "record.json").read_text())

    @property
    def completions(self) -> dict[int, dict[str, Any]]:
        lines = read_completions(self.directory / "completions.jsonl")
        by_index = {line["index"]: line for line in lines}
        assert len(by_index) == len(lines), "a request came back twice"
        return by_index

    @property
    def token_ids(self) -> dict[int, list[int]]:
        return {index: line["token_ids"] for index, line in self.completions.items()}


def variables(**more: str) -> dict[str, str]:
    """Returns the environment of a shell that knows nothing of this test session, and has no MLflow."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "HYDRA"))}
    path = os.pathsep.join(filter(None, (str(ABSENT), os.environ.get("PYTHONPATH"))))
    return kept | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path} | more


def command(*overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> list[str]:
    """Returns the command line of a run; ``launcher`` may be ``deepspeed`` with its flags."""
    return [*launcher, "harness/main.py", *overrides]


def ran(
    results: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,), cold: bool = False, **more: str
) -> Run:
    """Runs the harness from the repository's root to its end.

    Args:
        launcher: ``deepspeed`` with its flags, for a run under it.
        cold: begin Python anew, and each rank, as a user does. Without it they are forks of a process that has imported
            PyTorch and the rest, unless ``more`` has variables that are read at import.
        more: further environment variables.
    """
    line = command(*overrides, f"results_dir={results}", launcher=launcher)
    if line[0] == sys.executable:
        line = line[1:]
    done = python(*line, cold=cold, timeout=900, **more)
    return Run(done.returncode, done.stdout, done.stderr, results)


def python(
    *words: str, cwd: Path = ROOT, cold: bool = False, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``python`` with ``words``, or the program that they name, to its end.

    Args:
        cold, more: as in :func:`ran`.
        timeout: seconds.
    """
    environment = variables(**more)
    if not cold and warm.suits(environment) and words[0].endswith(("-m", ".py", "/deepspeed")):
        return warm.run(list(words), cwd, environment, timeout)
    line = list(words) if shutil.which(words[0]) else [sys.executable, *words]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def deepspeed(ranks: int, *flags: str) -> tuple[str, ...]:
    """Returns DeepSpeed's launcher for ``ranks`` CPU ranks."""
    from harness.ranks.rank import free_port

    return (str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *flags)


def launched(directory: Path, script: str, ranks: int, *arguments: str, **environment: str) -> Any:
    """Runs a script under DeepSpeed's launcher for one host; returns the JSON that rank 0 wrote to the last word.

    Its ranks are forks, as in :func:`ran`.
    """
    from harness.running import launcher

    (directory / "rank.py").write_text(script)
    place = directory / "outcome.json"
    line = launcher.command(ranks, "cpu", [*arguments, str(place)], directory / "rank.py")
    done = python(*line[line.index("-u") + 1 :], **environment)
    assert place.exists(), done.stderr
    return json.loads(place.read_text())


def together(directory: Path, script: str, ranks: int, *arguments: str) -> list[Any]:
    """Runs a script in ``ranks`` processes at once, forks as in :func:`ran`; returns the JSON that each of them wrote.

    Its arguments are the rank, a port for all of them, the file to write, and ``arguments``. It may import tests.
    """
    from harness.ranks.rank import free_port

    (directory / "rank.py").write_text(script)
    port, places = str(free_port()), [directory / f"{rank}.json" for rank in range(ranks)]

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        words = (str(directory / "rank.py"), str(rank), port, str(places[rank]), *arguments)
        return python(*words, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(ranks) as pool:
        done = list(pool.map(one, range(ranks)))
    assert [rank.returncode for rank in done] == [0] * ranks, [rank.stderr for rank in done]
    return [json.loads(place.read_text()) for place in places]


def assert_refused(done: subprocess.CompletedProcess[str], line: str) -> None:
    """Asserts that a command ended as one does that refuses its input: one line, which starts so, and status 2."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


# A LLaMA of two layers with random weights: real code, next to no arithmetic.
TINY = [
    "model=llama2_7b",
    "model.weights=dummy",
    "model.dtype=float32",
    *(
        f"model.architecture.{key}={value}"
        for key, value in {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }.items()
    ),
    "generation.stop=length",
]
RANDOM = ["dataset=synthetic", "dataset.prompt=random"]
# Beside TINY: no arithmetic and no torch, for what ends, resumes or sweeps a run of one rank whatever its engine is.
SIMULATED = ["engine=simulate", "hardware=h100_80g"]
PACED = [*SIMULATED, "engine.pace=20"]  # a hundred requests a second, or a minute would be over in one


def check_against_ids(run: Run) -> None:
    """Recounts a run from its completions alone and compares with its row."""
    done = [line for line in run.completions.values() if line["finish_reason"] != "rejected"]
    row = run.row
    prompt = sum(line["prompt_tokens"] for line in done)
    output = sum(len(line["token_ids"]) for line in done)
    assert (int(row["prompt_tokens"]), int(row["output_tokens"])) == (prompt, output)
    assert int(row["total_tokens"]) == prompt + output
    assert int(row["completed"]) == len(done)
    elapsed = float(row["elapsed_s"])
    assert float(row["total_tokens_per_s"]) == pytest.approx((prompt + output) / elapsed, rel=1e-5)
    assert float(row["output_tokens_per_s"]) == pytest.approx(output / elapsed, rel=1e-5)
    assert max(line["finished_s"] for line in done) <= elapsed
    for line in done:
        assert line["output_tokens"] == len(line["token_ids"])
        assert 0 < line["first_token_s"] <= line["finished_s"]


def start(
    results: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,), forked: bool = False
) -> subprocess.Popen[str]:
    """Starts a run of many small requests and returns when some of them are finished; ``forked``: see :func:`begun`."""
    # For more than a minute; each rank takes time to make them, so few with many tokens.
    count, tokens = (10_000, 16) if PACED[-1] in overrides else (20_000, 80)
    arguments = command(
        *TINY,
        *RANDOM,
        f"dataset.num_samples={count}",
        "dataset.input_len=16",
        f"dataset.output_len={tokens}",
        *overrides,
        f"results_dir={results}",
        launcher=launcher,
    )
    process = begun(arguments, forked=forked)
    wait_until_begun(results, process, size=10_000)
    return process


def as_fork(line: list[str]) -> list[str]:
    """Returns the command line of a fork that does what another one does: that of Python, or of one of its scripts."""
    return [str(warm.interpreter()), *(line[1:] if line[0] == sys.executable else line)]


def begun(
    line: list[str], cwd: Path = ROOT, environment: dict[str, str] | None = None, forked: bool = False, **how: Any
) -> subprocess.Popen[str]:
    """Starts a command line, between pipes of text, and returns its process.

    Args:
        environment: that of :func:`variables`, where nothing is said.
        how: what else :class:`subprocess.Popen` is told.
        forked: it and its ranks are forks, as in :func:`ran`: for tests that look at ranks and kill some. What is
            returned is a fork's stand-in, which ends as its fork does; :func:`family` has the forks. It is not a user's
            launch where a launcher looks for stopped ranks, or ranks for a killed ``deepspeed``.
    """
    environment = environment or variables()
    if forked and warm.suits(environment):
        line = as_fork(line)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=cwd, env=environment, text=True, **(pipes | how))


def wait_until_begun(results: Path, *processes: subprocess.Popen[str], size: int = 0) -> None:
    """Returns when a run in ``results`` has written more than ``size`` bytes of completions.

    It may take five minutes, beside other tests; none of its ``processes`` may end before.
    """
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size > size for path in results.glob("*/completions.jsonl")):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.05)


def family(process: psutil.Process) -> list[tuple[list[str], psutil.Process]]:
    """Returns what a process has started and what these have: each with its command line, forks for their stand-ins."""
    found = []
    for child in warm.fork_of(process).children():
        with suppress(psutil.NoSuchProcess):  # it has ended
            found.append((child.cmdline(), warm.fork_of(child)))
            found += family(child)
    return found


def local_rank(words: list[str]) -> int | None:
    """Returns which rank of its host a command line starts; None for any other."""
    found = [int(word.removeprefix("--local_rank=")) for word in words if word.startswith("--local_rank=")]
    return found[0] if found and any(word.endswith("harness/main.py") for word in words) else None


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the rank processes of a launch, in the order of their local rank; a lone one is the process itself."""
    launcher = psutil.Process(process.pid)
    found = {number: member for words, member in family(launcher) if (number := local_rank(words)) is not None}
    return [found[number] for number in sorted(found)] or [warm.fork_of(launcher)]


def ended(process: subprocess.Popen[str], results: Path, within_s: float = 120) -> tuple[int, str, dict[str, str]]:
    """Waits for the end; returns exit status, stderr and the row, having checked that nothing was left behind."""
    started = [member for _, member in family(psutil.Process(process.pid))]
    _, stderr = process.communicate(timeout=within_s)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    (row,) = read_rows(results / "runs.csv")
    lines = read_completions(results / row["run_id"] / "completions.jsonl")
    assert int(row["completed"]) == len(lines) > 0
    assert row["total_tokens_per_s"] == ""
    return process.returncode, stderr, row
