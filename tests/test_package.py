"""The package that pip makes: it holds all that a run needs, writes nothing into itself, and gives the same tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import ROOT, SIMULATED, TINY, Run, deepspeed, variables

from harness.config import own
from harness.config.compose import compose
from harness.engines import catalogue
from harness.machine.snapshot import code_fingerprint, git_state
from harness.results.completions import read_completions

BUILT_FROM = ("harness", "conf", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# In float32 on every processor, as the simulation is that a fit of it serves.
SHORT = ["model.dtype=float32", "dataset.num_samples=4", "generation.max_output_len=8", "engine.token_budget=64"]
JOBS = [*TINY, *SIMULATED, "dataset=synthetic", "dataset.num_samples=4", "dataset.output_len=4", "model.tokenizer=null"]


# --- options of the user's own ---


@pytest.mark.parametrize("checkout", [True, False])
def test_an_option_of_ones_own_goes_where_it_can_stay(
    checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "hardware").mkdir(parents=True)
    monkeypatch.setattr(own, "CONF", tmp_path / "conf")
    monkeypatch.setattr(own, "CHECKOUT", checkout)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    expected = tmp_path / ("conf" if checkout else "cache/conf") / "hardware" / "local.yaml"
    assert own.own_option("hardware", "local") == expected
    (tmp_path / "conf" / "hardware" / "local.yaml").touch()  # which Hydra would find first
    assert own.own_option("hardware", "local").parent == tmp_path / "conf" / "hardware"


def test_hydra_finds_an_option_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    mine = tmp_path / "conf" / "hardware" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\nmemory_bandwidth: 5.0e9\n")
    catalogue.register()
    assert compose(["hardware=mine"]).hardware.memory_bandwidth == 5e9


# --- the wheel ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory into which pip has installed a wheel of this checkout, without what it depends on."""
    place = tmp_path_factory.mktemp("package")
    source = place / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(place / "site")]
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True, timeout=300)
    return place / "site"


@pytest.fixture
def installed(site: Path, tmp_path: Path, quick_python: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs a command of the installed package from ``/``, which leaves the package as it is.

    But for ``--full`` it is a fork that imports the package's modules alone.
    """

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        before = contents(site)
        line = [quick_python, str(site / "bin" / words[0]), *words[1:]] if words[0].startswith("llama") else list(words)
        environment = variables(PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1", **more)
        done = subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, timeout=600)
        assert contents(site) == before
        return done

    return run


def contents(place: Path) -> dict[str, str]:
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_the_wheel_is_the_checkout(site: Path, installed: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ask = "from harness.basics import places; from harness.machine import snapshot; import json; print(json.dumps("
    ask += "[places.CHECKOUT, snapshot.code_fingerprint(), snapshot.snapshot('cpu')['git']]))"
    checkout, fingerprint, _ = json.loads(installed(sys.executable, "-c", ask).stdout)
    assert (checkout, fingerprint) == (False, code_fingerprint())
    conf = {name: digest for name, digest in contents(ROOT / "conf").items() if name != "README.md"}
    assert contents(site / "harness" / "conf") == {
        name: digest for name, digest in conf.items() if not name.endswith("/local.yaml") and "tuned_" not in name
    }


@pytest.mark.slow
@pytest.mark.skipif(git_state(ROOT) is None, reason="needs a checkout")
def test_a_package_knows_its_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(tmp_path / "clone")], check=True)
    words = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
        str(tmp_path / "clone"),
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, str(tmp_path / "clone")], check=True, timeout=300)
    built = json.loads((tmp_path / "site" / "harness" / "built.json").read_text())
    assert built == {"commit": (git_state(ROOT) or {})["commit"], "dirty": False}


@pytest.mark.slow
def test_a_run_from_anywhere_gives_the_same_tokens(
    installed: Callable[..., subprocess.CompletedProcess[str]], harness: Callable[..., Run], tmp_path: Path
) -> None:
    done = installed("llama-harness", *SHORT, f"results_dir={tmp_path / 'packed'}")
    assert done.returncode == 0, done.stderr
    packed = Run(done.returncode, done.stdout, done.stderr, tmp_path / "packed")
    here = harness(*SHORT)
    assert len(packed.token_ids) == 4 and packed.token_ids == here.token_ids
    assert packed.record["job_hash"] == here.record["job_hash"]
    table = str(tmp_path / "packed" / "runs.csv")
    assert packed.row["run_id"] in installed("llama-harness-compare", table).stdout
    verified = installed("llama-harness-verify", packed.row["run_id"], "--results", str(tmp_path / "packed"))
    assert verified.returncode == 0, verified.stderr
    refused = installed("llama-harness", f"resume={packed.row['run_id']}", f"results_dir={tmp_path / 'packed'}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    cache = {"HARNESS_CACHE": str(tmp_path / "cache")}
    fit = ("--fit", packed.row["run_id"], "--results-dir", str(tmp_path / "packed"))
    fitted = installed("llama-harness-plan", *fit, **cache)
    assert fitted.returncode == 0, fitted.stderr
    assert (tmp_path / "cache" / "conf" / "hardware" / "local.yaml").is_file()
    simulated = installed("llama-harness", *JOBS, "hardware=local", f"results_dir={tmp_path / 'fit'}", **cache)
    assert simulated.returncode == 0, simulated.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["its own", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_several_ranks_find_the_package(
    installed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, launcher: str
) -> None:
    words = [*TINY, "dataset=synthetic", "dataset.num_samples=4", "dataset.output_len=4", f"results_dir={tmp_path}"]
    if launcher == "deepspeed":
        done = installed(*deepspeed(2, "--module"), "harness.main", *words)
    else:
        done = installed("llama-harness", *words, "parallel.dp=2")
    assert done.returncode == 0, done.stderr
    run = Run(0, done.stdout, done.stderr, tmp_path)
    assert (run.row["dp"], len(read_completions(run.directory / "completions.jsonl"))) == ("2", 4)


@pytest.mark.slow
def test_sweeps_resumed_runs_and_questions_from_anywhere(
    installed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    swept = installed("llama-harness", "-m", *JOBS, "engine.token_budget=64,128", f"results_dir={tmp_path}")
    assert swept.returncode == 0 and "2 of 2 jobs ok" in swept.stdout, swept.stdout + swept.stderr
    stopped = installed(
        "llama-harness", *JOBS, "timeout_s=1", "engine.pace=1000", f"results_dir={tmp_path / 'stopped'}"
    )
    (run_id,) = (path.parent.name for path in (tmp_path / "stopped").glob("*/record.json"))
    resumed = installed("llama-harness", f"resume={run_id}", "timeout_s=null", f"results_dir={tmp_path / 'stopped'}")
    assert (stopped.returncode, resumed.returncode) == (1, 0), stopped.stderr + resumed.stderr
    for command in ("accuracy", "doctor", "plan", "compare", "verify"):
        assert installed(f"llama-harness-{command}", "--help").returncode == 0
    assert installed("llama-harness-doctor", "--json").returncode in (0, 1)
