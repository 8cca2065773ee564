"""What the tests share: real runs of the harness, and Hugging Face's own answers to compare with."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from harness.completions import read_completions
from harness.engines.fastgen.native import checks as native_checks
from harness.environment import cpu_flags
from harness.runs_table import read_rows

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SAMPLE = ROOT / "harness" / "data" / "sample.jsonl"

# The same examples each time, so that a change is judged by what it changes; other ones: --hypothesis-profile=search
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

needs_native = pytest.mark.skipif(
    not cpu_flags().issuperset(native_checks.INSTRUCTIONS), reason="this processor has no AVX-512"
)
needs_native_bfloat16 = pytest.mark.skipif(
    not cpu_flags().issuperset((*native_checks.INSTRUCTIONS, native_checks.BFLOAT16)),
    reason="this processor has no AVX512-BF16",
)


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
    """Returns the environment of a shell that knows nothing of this test session."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "HYDRA"))}
    return kept | {"DS_ACCELERATOR": "cpu"} | more


def command(*overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> list[str]:
    """Returns the command line of a run; ``launcher`` may be ``deepspeed`` with its flags."""
    return [*launcher, "harness/main.py", *overrides]


def deepspeed(ranks: int, *flags: str) -> tuple[str, ...]:
    """Returns DeepSpeed's launcher for ``ranks`` CPU ranks."""
    from harness.launcher import free_port

    return (str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *flags)


def launched(directory: Path, script: str, ranks: int, *arguments: str, **environment: str) -> Any:
    """Runs a script under DeepSpeed's launcher; returns what rank 0 wrote, as JSON, to the last argument it got."""
    (directory / "rank.py").write_text(script)
    place = directory / "outcome.json"
    done = subprocess.run(
        [*deepspeed(ranks, "--log_level", "critical"), str(directory / "rank.py"), *arguments, str(place)],
        cwd=ROOT,
        env=variables(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert place.exists(), done.stderr
    return json.loads(place.read_text())


def assert_refused(done: subprocess.CompletedProcess[str], line: str) -> None:
    """Asserts that a command ended as one does that refuses its input: one line, which starts so, and status 2."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def kernels_on_cpu(model: Path, dtype: str) -> str:
    """Returns what ``engine.kernels=auto`` takes on this machine for the checkpoint in ``model``."""
    architecture = json.loads((model / "config.json").read_text())
    reason = native_checks.unsupported(architecture, dtype, 1) or native_checks.slower(dtype)
    return "native" if reason is None else "torch"


def save_model(directory: Path, model_type: str, dtype: Any, sharp: float = 1.0, **sizes: Any) -> Path:
    """Writes a model whose weights are large enough for attention, norms, biases and positions to matter.

    ``sharp`` scales queries and keys.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif name == "model.embed_tokens.weight":
            torch.nn.init.normal_(weight, std=0.7)
        else:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[1] ** -0.5)
            if "q_proj" in name or "k_proj" in name:
                weight.data *= sharp
    model.to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--full``."""
    parser.addoption(
        "--full", action="store_true", help="all repetitions of the tests marked endurance (an hour or two)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the cases marked ``full`` to ``--full``."""
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full") is not None:
                item.add_marker(pytest.mark.skip(reason="with --full"))


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Returns a function that picks how often to repeat: ``scale(few, all)``, all of them with ``--full``."""
    full = request.config.getoption("--full")
    return lambda few, every: every if full else few


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., Run]:
    """Returns a function that runs the harness from the repository's root with results of its own."""

    def run(
        *overrides: str,
        launcher: tuple[str, ...] = (sys.executable,),
        results: Path = tmp_path / "results",
        **environment: str,
    ) -> Run:
        done = subprocess.run(
            command(*overrides, f"results_dir={results}", launcher=launcher),
            cwd=ROOT,
            env=variables(**environment),
            capture_output=True,
            text=True,
            timeout=900,
        )
        return Run(done.returncode, done.stdout, done.stderr, results)

    return run


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Returns the demo model's directory, fetched and converted if this is the first time."""
    from harness import demo_model

    return demo_model.ensure()


ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, sample, count, part, parts = sys.argv[1:]
torch.set_num_threads(max(1, torch.get_num_threads() // int(parts)))
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
answers = {}
for index, line in enumerate(open(sample, encoding="utf-8").readlines()[: int(count)]):
    if index % int(parts) == int(part):
        entry = json.loads(line)
        inputs = tokenizer(entry["prompt"], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=entry["output_len"])
        answers[index] = output[0, inputs.input_ids.shape[1] :].tolist()
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def reference(demo_model: Path, request: pytest.FixtureRequest) -> dict[int, list[int]]:
    """Returns, by index, the ids that Hugging Face's ``generate`` gives for prompts of ``sample`` in fp32.

    These are the first 24, or with ``--full`` all 72. Two processes share them: with one thread each they are faster
    than one with two.
    """
    count = "72" if request.config.getoption("--full") else "24"
    arguments = [sys.executable, "-c", ANSWER, str(demo_model), str(SAMPLE), count]
    helpers = [
        subprocess.Popen([*arguments, str(part), "2"], stdout=-1, env=variables(), text=True, cwd=ROOT)
        for part in range(2)
    ]
    outputs = [helper.communicate(timeout=1200)[0] for helper in helpers]
    assert [helper.returncode for helper in helpers] == [0, 0]
    return {int(index): ids for output in outputs for index, ids in json.loads(output).items()}
