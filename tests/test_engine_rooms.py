"""One engine, one room: what each declares, what is imported for it, and an engine from outside the package."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from support import toys
from support.in_process import answered
from support.runs import RANDOM, ROOT, TINY, Run, assert_refused, python, start, variables

from harness.basics.errors import UserError
from harness.config.compose import compose, to_config
from harness.engines import catalogue
from harness.engines.base import Engine
from harness.results import segments
from harness.results.completions import read_completions
from harness.running import engine_sweep

Harness = Callable[..., Run]
HEAVY = ("torch", "transformers", "deepspeed", "numpy", "accelerate")
NAMES = ("fastgen", "ds_inference", "baseline")
SMALL = [*TINY, *RANDOM, "dataset.num_samples=3", "dataset.input_len=8", "dataset.output_len=4"]


@pytest.mark.parametrize("name", catalogue.names())
def test_an_engine_s_file_and_its_class_have_the_same_keys_and_values(name: str) -> None:
    option = yaml.safe_load((ROOT / "conf" / "engine" / f"{name}.yaml").read_text())
    assert option.pop("defaults") == [f"/{name}_schema@_here_", "_self_"]
    config = catalogue.find(name).config
    assert list(option) == [field.name for field in fields(config)]
    assert OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True) == option


@pytest.mark.parametrize("name", [name for name in catalogue.names() if catalogue.find(name).engine])
def test_a_room_names_keys_that_it_has_and_a_class_that_is_an_engine(name: str) -> None:
    room = catalogue.find(name)
    assert {*room.resume_keys, *(room.proof_keys or ())} <= {*room.keys}
    module, _, kind = room.engine.partition(":")
    assert issubclass(getattr(__import__(module, fromlist=[kind]), kind), Engine)


def test_the_catalogue_imports_nothing_heavy_and_a_room_only_when_asked() -> None:
    script = f"""
import json, sys
from harness.engines import catalogue
rooms = lambda: [name for name in sys.modules if name.endswith(".room") and name != "harness.engines.room"]
before = rooms()
catalogue.find("baseline")
one = rooms()
catalogue.register()
print(json.dumps([before, one, [name for name in {HEAVY} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["harness.engines.baseline.room"], []]


def test_no_engine_is_tested_by_name_outside_its_room() -> None:
    quoted = [f'"{name}"' for name in catalogue.names()]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "harness").rglob("*.py")
        if not path.is_relative_to(ROOT / "harness" / "engines")
        for line in path.read_text().splitlines()
        if any(name in line for name in quoted)
    ]
    # compare's usual baseline, and the records of before, whose config had the keys of all engines.
    assert {line.partition(":")[0] for line in found} <= {
        "harness/compare/choosing.py",
        "harness/compare/reading.py",
        "harness/compare/page.py",
        "harness/compare/text.py",
    }, found


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["engine=baseline", "engine.token_budget=64"],
            "engine.token_budget: 64: engine=baseline has no such key, fast",
        ),
        (["engine=baseline", "++engine.token_budget=64"], "engine.token_budget: 64: engine=baseline has no such key"),
        (
            ["engine=ds_inference", "engine.quantization=wf6af16"],
            "engine.quantization: wf6af16: engine=ds_inference has",
        ),
        (
            ["engine=mii", "engine.kernels=torch"],
            "engine.kernels: torch: engine=mii has no such key, fastgen has; leave",
        ),
        (["engine=simulate", "engine.kernels=torch"], "engine.kernels: torch: engine=simulate has no such key"),
        (
            ["experiment=asc24_70b_8gpu", "engine=baseline"],
            "engine.token_budget: engine=baseline has no such key, fastgen, mii and simulate have (experiment",
        ),
        (["engine=baseline", "engine.token_bugdet=64"], "engine.token_bugdet: no such key; did you mean engine.token_"),
    ],
)
def test_a_key_of_another_engine_is_refused(words: list[str], line: str) -> None:
    catalogue.register()
    GlobalHydra.instance().clear()
    with pytest.raises(UserError) as refused:
        to_config(compose(words))
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_no_engine_is_refused() -> None:
    with pytest.raises(UserError, match=r"^engine\.name: 'vllm'; choose one of baseline, ds_inference, fastgen, mii"):
        catalogue.find("vllm")
    assert catalogue.of_record("vllm").less_memory({}, None) is None


# What every record had in its engine section until each engine had its own keys.
ALL_KEYS = {
    **{"kernels": "torch", "token_budget": 64, "max_sequences": 8, "order": "longest_first", "kv_block_size": 64},
    **{"kv_memory": 0.3, "batch_size": 16, "batch_tokens": 32768, "kernel_inject": False, "cuda_graph": False},
    **{"quantization": None, "prefix_sharing": False, "draft": None, "draft_len": 4},
}


@pytest.mark.parametrize("name", ["baseline", "ds_inference", "fastgen", "mii"])
def test_a_record_of_before_has_the_engine_s_own_keys_taken(name: str) -> None:
    recorded = OmegaConf.create({"engine": {"name": name, **ALL_KEYS}, "parallel": {"tp": 1, "dp": 1}})
    found = OmegaConf.to_container(catalogue.typed(recorded), enum_to_str=True)
    keys = catalogue.find(name).keys
    assert isinstance(found, dict)
    assert found["engine"] == {"name": name, **{key: ALL_KEYS[key] for key in keys}}
    before, now = {"engine": {"name": name, **ALL_KEYS}}, {"engine": found["engine"]}
    assert segments.changed(before, now) == {}


@pytest.mark.slow
def test_a_run_of_before_can_be_resumed(tmp_path: Path, harness: Harness) -> None:
    results = tmp_path / "results"
    process = start(results, "engine.kernels=torch", forked=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    (directory,) = results.glob("2*/")
    for name, read, written in (
        ("config.yaml", yaml.safe_load, yaml.safe_dump),
        ("record.json", json.loads, json.dumps),
    ):
        kept = read((directory / name).read_text())
        section = (kept if name == "config.yaml" else kept["config"])["engine"]
        section |= {key: value for key, value in ALL_KEYS.items() if key not in section}
        (directory / name).write_text(written(kept))
    run = harness(f"resume={directory.name}", "timeout_s=8", results=results)
    assert run.row["status"] == "timeout", run.stderr
    assert run.record["segments"][-1]["changed"] == {}
    assert "batch_size" not in yaml.safe_load((directory / "config.yaml").read_text())["engine"]
    assert_refused(
        answered(f"resume={directory.name}", "engine.batch_size=4", f"results_dir={results}"),
        "error: engine.batch_size: 4: engine=fastgen has no such key, ds_inference has; leave it out",
    )


@pytest.mark.parametrize(
    ("words", "marked"),
    [
        (["-m", "engine=fastgen,ds_inference", "engine.token_budget=1,2"], ["engine.token_budget=1,2"]),
        (["-m", "engine=ds_inference,baseline", "engine.batch_size=4"], ["engine.batch_size=4"]),  # not the default's
        (["-m", "engine=glob(*)", "engine.order=dataset"], ["engine.order=dataset"]),
        (["-m", "engine=baseline,simulate", "engine.kernels=torch"], []),  # nobody's: Hydra refuses it
        (["-m", "engine=mii", "engine.kernels=auto,torch"], []),
        (["-m", "engine=fastgen,mii", "engine.token_bugdet=1"], []),
        (["-m", "engine=fastgen,", "engine.token_budget=1"], []),
    ],
    ids=str,
)
def test_keys_are_let_through_where_engines_are_swept(words: list[str], marked: list[str]) -> None:
    found = engine_sweep.lenient(words)
    assert found == [f"++{word}" if word in marked else word for word in words]
    assert [engine_sweep.plain(word) for word in found] == words


def test_jobs_of_a_sweep_over_engines_have_their_own_keys() -> None:
    products = [[f"engine={name}", f"++engine.token_budget={size}", "repeat=2"] for name in NAMES for size in (64, 128)]
    found = engine_sweep.jobs(products)
    assert found.words[:3] == [
        ["engine=fastgen", "engine.token_budget=64", "repeat=2"],
        ["engine=fastgen", "engine.token_budget=128", "repeat=2"],
        ["engine=ds_inference", "repeat=2"],
    ]
    assert found.same == [0, 1, 2, 2, 4, 4]
    assert found.notes == [
        "engine=ds_inference has no token_budget: left out of its jobs",
        "engine=baseline has no token_budget: left out of its jobs; 2 that would be the same are not run again",
    ]
    alike = engine_sweep.jobs([["engine=fastgen", "engine.token_budget=64"]] * 2)  # the user's own: both run
    assert (alike.same, alike.notes) == ([0, 1], [])


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a machine with the package of the toy engine."""
    return toys.installed(tmp_path / "site")


@pytest.mark.slow
def test_an_engine_from_outside_runs_sweeps_and_compares(
    tmp_path: Path, harness: Harness, outside: dict[str, str]
) -> None:
    there = toys.OPTIONS
    run = harness("engine=toy", "engine.reply=7", there, *SMALL, **outside)
    assert run.status == 0, run.stderr
    assert (run.row["engine"], run.row["kernels"], run.row["completed"]) == ("toy", "none", "3")
    assert {tuple(line["token_ids"]) for line in run.completions.values()} == {(7, 7, 7, 7)}
    assert run.record["config"]["engine"] == {"name": "toy", "reply": 7, "work_s": 0.0, "added": 0.0}

    sweep = harness("-m", "engine=toy,baseline", "engine.reply=6,8", there, *SMALL, **outside)
    assert sweep.status == 0, sweep.stdout + sweep.stderr
    assert [(row["engine"], row["status"]) for row in sweep.rows[1:]] == [
        ("toy", "ok"),
        ("toy", "ok"),
        ("baseline", "ok"),
    ]
    note = "engine=baseline has no reply: left out of its jobs; 1 that would be the same is not run again\n[1/3] "
    assert sweep.stdout.startswith(note)
    replies = [read_completions(sweep.results / row["run_id"] / "completions.jsonl") for row in sweep.rows[1:3]]
    assert [{*line["token_ids"]} for lines in replies for line in lines[:1]] == [{6}, {8}]

    compared = python("-m", "harness.compare", str(sweep.results))
    assert compared.returncode == 0, compared.stderr
    assert "toy" in compared.stdout and "reply" in compared.stdout


def test_an_engine_from_outside_has_its_keys_checked(tmp_path: Path, outside: dict[str, str]) -> None:
    there = toys.OPTIONS

    def refused(*words: str) -> subprocess.CompletedProcess[str]:
        return python("harness/main.py", there, *words, f"results_dir={tmp_path / 'results'}", **outside)

    assert_refused(refused("engine=toy", "engine.reply=x"), "error: engine.reply: 'x' is no whole number; ")
    assert_refused(refused("engine=toy", "engine.reply=0"), "error: engine.reply: 0; give a whole number from 1 to ")
    assert_refused(
        refused("engine=baseline", "engine.reply=5"),
        "error: engine.reply: 5: engine=baseline has no such key, toy has; ",
    )
