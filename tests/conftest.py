"""What the tests share: real runs of the harness, and Hugging Face's own answers to compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from support.runs import ROOT, SAMPLE, Run, command, variables

# The same examples each time, so that a change is judged by what it changes; other ones: --hypothesis-profile=search
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


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
