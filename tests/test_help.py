"""What the command line says of itself: ``--help``, ``--version``, completion, and readers that leave early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import BIN, ROOT, deepspeed, python, variables

from harness import __version__
from harness.config.engine_schemas import registered
from harness.config.help import WIDTH
from harness.config.reference import sections
from harness.engines import catalogue

SAMPLE = "results/reference/sample"
RUN_ID = "20261123-221840-fastgen-7ef4"


def described(*words: str) -> str:
    done = python("harness/main.py", "--help", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("engine", ["fastgen", "ds_inference"])
def test_help_has_every_key_of_the_engine_with_what_the_schema_says(engine: str) -> None:
    shown = described(f"engine={engine}")
    assert max(map(len, shown.splitlines())) <= WIDTH
    words = " ".join(shown.split())
    catalogue.register()
    for keys in sections(registered()[engine]).values():
        for key in keys:
            if not key.name.endswith(".name"):
                assert f" {key.name}=" in words
                assert f"{key.allowed})".replace("`", "") in words, key.name
                assert f") {key.meaning} ".replace("`", "") in words, key.name
    others = {f"engine.{field}" for name in registered() if name != engine for field in ("kernels", "batch_size")}
    own = {key.name for key in sections(registered()[engine])["engine"]}
    assert not [key for key in others - own if f" {key}=" in words]


def test_help_shows_the_groups_and_the_values_as_composed() -> None:
    shown = described("dataset=synthetic", "experiment=quickstart", "timeout_s=60")
    for line in (
        "  engine      baseline, ds_inference, [fastgen], mii, simulate",
        "dataset=synthetic",
        "  dataset.num_samples=16   (requests: whole number)",
        "  timeout_s=60.0   (seconds: 0.001 to 1e9)",
    ):
        assert line in shown.splitlines(), line
    assert " sharegpt, [synthetic], " in " ".join(shown.split()) and "  dataset.input_len=128\n" in shown
    for word in ("results/runs.csv", "deepspeed", "-m", "--version", "-sc install=bash"):
        assert word in shown


def test_help_for_what_cannot_be_composed_is_one_line() -> None:
    done = python("harness/main.py", "--help", "engine=vllm")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: engine: no option named 'vllm'; choose one of ")


def test_the_version_is_ours() -> None:
    done = python("harness/main.py", "--version")
    first, second, *packages = done.stdout.splitlines()
    assert first.startswith(f"deepspeed-llama-harness {__version__}")
    assert second == f"Python {sys.version.split()[0]}"
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    for package in ("torch", "transformers", "deepspeed"):
        assert f"{package} " in " ".join(packages)


@pytest.mark.slow
def test_under_deepspeed_the_first_rank_alone_answers() -> None:
    done = python(*deepspeed(2), "harness/main.py", "--version")
    assert done.stdout.count("Python ") == 1, done.stderr


@pytest.mark.slow
def test_a_shell_completes_groups_options_and_keys() -> None:
    """The functions that ``-sc install=bash`` prints, asked as bash asks them."""
    asked = {
        "python harness/main.py engine.tok": "engine.token_budget=",
        "python harness/main.py engine=ds": "engine=ds_inference",
        "python harness/main.py engine=ds_inference engine.batch_s": "engine.batch_size=",
    }
    script = [f"PATH={BIN}:$PATH", 'eval "$(python harness/main.py -sc install=bash)"']
    for line in asked:
        script.append(f"COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_CWORD={len(line.split()) - 1}")
        script.append('hydra_bash_completion; echo "${COMPREPLY[@]}"')
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == list(asked.values()), done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["harness/main.py", "--help"],
        ["harness/main.py", "--cfg", "job"],
        ["-m", "harness.compare", "--help"],
        ["-m", "harness.compare", SAMPLE],
        ["-m", "harness.plan", "model=llama2_70b", "hardware=h100_80g", "--devices", "8"],
        pytest.param(["harness/main.py", "--hydra-help"], marks=pytest.mark.slow),
        pytest.param(["harness/main.py", "--info"], marks=pytest.mark.slow),
        pytest.param(["harness/main.py", "-sc", "install=bash"], marks=pytest.mark.slow),
        pytest.param(["-m", "harness.verify", RUN_ID, "--results", SAMPLE], marks=pytest.mark.slow),
        pytest.param(["-m", "harness.doctor"], marks=pytest.mark.slow),
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_a_reader_that_has_left_is_no_error(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == ("", 0)


def test_a_full_disk_is_one() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "harness/main.py", "--help"],
            cwd=ROOT,
            env=variables(),
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 2
    assert done.stderr == b"error: standard output: cannot be written: No space left on device; free space\n"
