"""Thousands of malformed command lines: one line and exit status 2, or a config in which nothing is absurd."""

from __future__ import annotations

import collections
import contextlib
import io
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from support.in_process import Launched, begin_anew, entry
from support.patience import no_hang
from support.runs import ROOT, SAMPLE, TINY, assert_refused, command, variables

from harness.config.checks import PEAK_DTYPES
from harness.config.reference import every
from harness.engines.catalogue import find, register
from harness.results.directory import read_record
from harness.results.table import read_rows
from harness.running import launcher
from harness.running.job import prepare

register()  # of each engine its own keys, among those that are tried
YEAR_S = 366 * 24 * 3600
GROUPS = {
    "engine": ["fastgen", "baseline", "ds_inference", "mii", "simulate", "vllm"],
    "model": ["smollm2_135m", "llama2_7b", "llama2_70b", "bert"],
    "dataset": ["sample", "asc24", "sharegpt", "jsonl", "text", "huggingface", "synthetic"],
    "generation": ["greedy"],
    "parallel": ["auto", "single", "tp2", "tp8", "dp2", "dp8"],
    "hardware": ["cpu", "a100_80g"],
    "tracking": ["none", "mlflow"],
    "experiment": ["quickstart", "tune", "splitfuse_sweep", "asc24_70b_8gpu", "../../etc/passwd"],
}
KEYS = [
    *(key for key in every() if key not in ("results_dir", "model.path")),
    *(
        f"model.architecture.{key}"
        for key in (
            *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_parameters.rope_theta"),
            *("hidden_act", "tie_word_embeddings", "eos_token_id", "intermediate_size", "dtype"),
        )
    ),
    *(
        "hardware.peak_flops.bfloat16",
        "hardware.peak_flops",
        "model.architecture",
        "engine",
        "dataset",
        "sweep",
        "model",
    ),
]
ODD = [
    *("0", "-1", "1", "2", "64", "1e3", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "1e308", "5e-324"),
    *(str(2**31), str(2**31 + 1), str(2**40), str(2**63), "9" * 30, "9" * 4000, "-" + "9" * 30, "1_000", "0x10", "007"),
    *(
        "true",
        "false",
        "null",
        "None",
        "yes",
        "''",
        '""',
        "' '",
        "'64'",
        "'nan'",
        "'1e400'",
        "'64 '",
        "???",
        "abc",
        "\u0661",
    ),
    *("[]", "{}", "[1,2]", "{a:1}", "[[[[[[1]]]]]]", "{a:{b:{c:nan}}}", "{model_type:bert}", "{model_type:llama}"),
    *(
        "${oops}",
        "${engine.token_budget}",
        "${oc.env:HOME}",
        "${oc.env:NOT_THERE}",
        "${oc.env:NOT_THERE,5}",
        "${oc.decode:'['}",
    ),
    *(
        "${hydra:run.dir}",
        "${model}",
        "${model.architecture}",
        "${model.path}",
        "${now:%Y}",
        "${nope:1}",
        "${",
        "$}",
        "\\${x}",
    ),
    *(
        "'a\tb'",
        "'\x1b[31m'",
        "'\u202e\u2028'",
        "'\x00'",
        "'\ud800'",
        "\u4f60\u597d",
        "'=cmd|x'",
        "'../x'",
        "/etc/passwd",
        "-rf",
    ),
    *(
        "0.5",
        "2GiB",
        "1 B",
        "0B",
        "999999999GiB",
        "'-1GiB'",
        "1PiB",
        "'.'",
        "int(5)",
        "int(x)",
        "choice(1,2)",
        "range(1,3)",
    ),
    *(
        "float16",
        "bfloat16",
        "torch",
        "deepspeed",
        "native",
        "dummy",
        "length",
        "eos",
        "random",
        "hi",
        "wf6af16",
        "bert",
        "a,b",
        "uniform:2:9",
        "uniform:9:2",
        "lognormal:5:1",
        "lognormal:1e400:1",
        "file:/etc/passwd",
    ),
    *(
        "dataset",
        "longest_first",
        "llama",
        "qwen2",
        "gpt2",
        "t5",
        "silu",
        "relu",
        "256",
        "100000",
        "1000000",
        "31",
        "'[CLS]'",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "[1",
        "a=b",
        "=",
        ",",
        "a b",
        ":",
        "@",
        "#",
        "%",
        "!!python/object:os.system",
        "\\",
    ),
]
VALUE = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(ODD),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.text(max_size=8).map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"),
)
LIKELY = st.sampled_from(["1", "2", "4", "8", "64", "100", "0.5", "1e-5", "true", "false", "null", "abc"])
RESULTS = [
    "''",
    "' '",
    "'\x00'",
    "'a\x1bb\nc'",
    "x" * 300,
    "'\ud800'",
    "../x",
    "~/x",
    "-rf",
    "'=cmd'",
    "null",
    "[a]",
    "'\u202e'",
]
BASES = [
    ["dataset=synthetic", "dataset.num_samples=2", "dataset.input_len=4", "dataset.output_len=3", *TINY],
    ["dataset=synthetic", "dataset.num_samples=2", "dataset.input_len=4", "dataset.output_len=3", *TINY],
    ["dataset.num_samples=2"],
    [],
]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Draws overrides; most are well-formed, so that what is behind the grammar is reached."""
    words = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        key, value = draw(st.sampled_from(KEYS)), draw(st.one_of(VALUE, LIKELY))
        kind = draw(st.integers(0, 19))
        if kind < 14:
            words.append(f"{key}={value}")
        elif kind < 16:
            group = draw(st.sampled_from(sorted(GROUPS)))
            option = draw(st.sampled_from(GROUPS[group]))
            several = f"[{option},{draw(st.sampled_from(GROUPS[group]))}]"
            words.append(
                draw(st.sampled_from([f"{group}={option}", f"{group}={several}", f"+{group}={option}", f"~{group}"]))
                if draw(st.booleans())
                else draw(st.sampled_from([f"{group}={value}", f"{group}@x={option}", f"{group}/{option}={value}"]))
            )
        elif kind < 18:
            form = [
                "+{0}={1}",
                "++{0}={1}",
                "~{0}",
                "~{0}={1}",
                "+{0}.foo={1}",
                "{0}x={1}",
                "{0}.0={1}",
                "{0}",
                ".{0}={1}",
            ]
            words.append(draw(st.sampled_from(form)).format(key, value))
        elif kind == 18:
            words.append(draw(st.text(max_size=12)))
        else:
            words.append(f"results_dir={draw(st.sampled_from(RESULTS))}")
    return [*draw(st.sampled_from(BASES)), *words]


# What no accepted job may have.


def every_number(value: Any) -> Iterator[float]:
    """Yields the numbers inside plain data."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from every_number(item)
    elif isinstance(value, int | float):
        yield value


def bytes_of(setting: object) -> float:
    """Returns ``engine.kv_memory`` as a number."""
    if isinstance(setting, str):
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*(|B|[KMG]i?B)\s*", setting, re.I | re.A)
        assert match, setting
        power = " kmg".index((match[2].lower() or " ")[0].replace("b", " "))
        return float(match[1]) * (1024 if "i" in match[2].lower() else 1000) ** power
    assert type(setting) in (int, float), setting
    return setting


def assert_sane(config: dict[str, Any]) -> None:
    """Asserts what holds for every run that makes sense, on the plain config that is recorded."""
    engine, model, dataset, parallel = (config[name] for name in ("engine", "model", "dataset", "parallel"))
    assert engine["name"] in ("fastgen", "baseline", "ds_inference")
    assert engine.keys() == {"name", *find(engine["name"]).keys}
    for name in engine.keys() & {"token_budget", "max_sequences", "kv_block_size", "batch_size", "batch_tokens"}:
        assert type(engine[name]) is int and 1 <= engine[name] <= 2**31, name
    if engine["name"] == "fastgen":
        assert engine["max_sequences"] <= engine["token_budget"]
        assert 0 < bytes_of(engine["kv_memory"]) < 2**60
        assert engine["kernels"] in ("auto", "native", "torch") and engine["quantization"] is None
    if engine["name"] == "ds_inference":
        assert not engine["kernel_inject"] and not engine["cuda_graph"]
    assert model["dtype"] in ("auto", "float32", "bfloat16")
    assert all(math.isfinite(number) for number in every_number(model["architecture"]))
    if model["weights"] == "dummy" and model["path"] is None:
        architecture = model["architecture"]
        assert isinstance(architecture["model_type"], str)
        if architecture["model_type"] == "llama":
            assert architecture["hidden_size"] > 0 and architecture["num_hidden_layers"] > 0
            assert architecture["num_attention_heads"] % (architecture.get("num_key_value_heads") or 1) == 0
            assert 0 < (architecture["rms_norm_eps"] or 1e-6) < 1
            assert ((architecture["rope_parameters"] or {}).get("rope_theta") or 1) > 0
            limit = architecture["max_position_embeddings"]
            assert model["max_context"] is None or 1 <= model["max_context"] <= limit
            assert 259 <= architecture["vocab_size"] <= 2**31
    for name in ("num_samples", "input_len", "output_len"):
        drawn = name != "num_samples" and str(dataset[name]).startswith(("uniform:", "lognormal:"))
        assert dataset[name] is None or drawn or (type(dataset[name]) is int and 1 <= dataset[name] <= 10**6), name
    assert dataset["chat_template"] or dataset["system_prompt"] is None
    assert dataset["prompt"] == "random" or dataset["shared_prefix"] == 0
    assert dataset["name"] in GROUPS["dataset"]
    assert 0 <= dataset["seed"] < 2**63
    assert config["generation"]["max_output_len"] is None or config["generation"]["max_output_len"] >= 1
    assert parallel["tp"] >= 1 and parallel["dp"] >= 1
    assert parallel["tp"] * parallel["dp"] <= 64 * (os.cpu_count() or 1)
    assert 1 <= config["repeat"] <= 10_000
    timeout = config["timeout_s"]
    assert timeout is None or 1e-3 <= timeout <= 100 * YEAR_S
    peaks = config["hardware"]
    assert set(peaks["peak_flops"]) <= set(PEAK_DTYPES)
    assert all(0 < number < math.inf for number in every_number({k: v for k, v in peaks.items() if k != "name"}))
    for text in (config["results_dir"], *(group["name"] for group in (engine, model, dataset, peaks))):
        assert isinstance(text, str) and text.strip() and "\x00" not in text
        text.encode()


def check_asked(words: list[str], config: dict[str, Any]) -> None:
    """Asserts that a whole number on the command line is the one in the config."""
    plain = {}
    for word in words:
        key, _, value = word.partition("=")
        plain[key.lstrip("+")] = value
    for key, value in plain.items():
        if re.fullmatch(r"-?[0-9]{1,15}", value) and not any(key.startswith(f"{other}.") for other in plain):
            found: Any = config
            for part in key.split("."):
                found = found[part]
            assert found in (bool(int(value)) if isinstance(found, bool) else int(value), value), key


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_model: Path) -> Iterator[ModuleType]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HARNESS_CACHE", str(demo_model.parent))  # or it would be fetched into that home
    with entry() as module:
        yield module


@pytest.mark.slow
@pytest.mark.endurance
def test_every_malformed_config_is_one_line(
    main: ModuleType,
    tmp_path: Path,
    scale: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tally: collections.Counter[str] = collections.Counter()
    inner = tmp_path / "deep" / "down"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    jobs: list[Any] = []

    def keep(composed: DictConfig, *arguments: Any) -> Any:
        jobs[:] = [prepare(composed, *arguments)]
        return jobs[0]

    monkeypatch.setattr(launcher.jobs, "prepare", keep)
    count = 0

    @hypothesis_settings(max_examples=scale(80, 2_600, 20), database=None, suppress_health_check=list(HealthCheck))
    @example(words=BASES[0])  # well-formed for certain: few of what is drawn are
    @example(words=[*BASES[0], "engine.token_budget=128"])
    @example(words=[*BASES[2], "engine.order=dataset"])
    @example(words=BASES[3])
    @given(words=command_lines())
    def fuzz(words: list[str]) -> None:
        nonlocal count
        count += 1
        results = tmp_path / f"results{count}"
        if not any(word.startswith("results_dir=") for word in words):
            words = [*words, f"results_dir={results}"]
        monkeypatch.setattr(sys, "argv", ["harness/main.py", *words])
        jobs.clear()
        output, errors, status = io.StringIO(), io.StringIO(), None
        begin_anew()
        try:
            with (
                no_hang(),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(errors),
            ):
                status = main.main()
        except Launched:
            tally["accepted"] += 1
            config = read_record(results, next(results.glob("*/record.json")).parent.name) if results.exists() else None
            if config is not None:
                assert_sane(config["config"])
                check_asked(words, config["config"])
            for job in jobs:
                assert job.workload.requests
                assert job.max_context is None or job.max_context >= 1
            return
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        line = errors.getvalue()
        if status == 0:  # --help and the like
            assert any(word.startswith("-") for word in words)
            return
        assert status == 2, (status, line)
        assert output.getvalue() == ""
        assert line.startswith("error: ") and line.endswith("\n") and len(line) <= 620
        assert line[:-1].isprintable(), ascii(line)
        assert re.match(r"error: [^:]+: .", line)
        if (results / "runs.csv").exists():
            (row,) = read_rows(results / "runs.csv")
            assert row["status"] == "invalid"
            tally["refused, with a row"] += 1
        else:
            tally["refused"] += 1

    started = time.perf_counter()
    fuzz()
    refused = tally["refused"] + tally["refused, with a row"]
    with capsys.disabled():
        seconds = time.perf_counter() - started
        print(f"\n{tally.total():,} configs in {seconds:.0f} s, {refused:,} malformed and refused: {dict(tally)}")
    assert refused >= scale(50, 2_000, 12)
    assert min(tally.values()) > tally.total() / 50 and len(tally) == 3


@pytest.mark.endurance
def test_every_malformed_command_line_is_one_line(
    tmp_path: Path, scale: Callable[[int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same through real processes; nothing that could start a run, since a run takes its time."""
    chance = random.Random(7)
    flags = [
        "-m",
        "--cfg",
        "--resolve",
        "-x",
        "--package",
        "--info",
        "--config-path=/nowhere",
        "--config-name=x",
        "--run",
    ]
    lines = [[chance.choice(flags)], ["-m", "--cfg", "job"], ["-m", "engine.token_budget=64,"]]
    while len(lines) < scale(6, 100):
        words = [f"{chance.choice(KEYS)}={chance.choice(ODD)}" for _ in range(chance.randrange(1, 3))]
        words = [word for word in words if "\x00" not in word and "\ud800" not in word]
        lines.append([*(chance.choices(flags) if chance.random() < 0.3 else []), *words])
    statuses: collections.Counter[int] = collections.Counter()
    started = time.perf_counter()
    for words in lines:
        # A sample that asks for too many requests is refused after everything else.
        arguments = ["dataset=sample", f"results_dir={tmp_path}", *words, f"dataset.num_samples={10**9}"]
        shown = [*words, "--cfg", "job"] if chance.random() < 0.1 and not words[0].startswith("-") else arguments
        done = subprocess.run(command(*shown), cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=120)
        statuses[done.returncode] += 1
        if done.returncode == 0:
            assert {"--cfg", "--info"} & set(shown)
            continue
        if "-m" in words and done.stdout:  # the jobs of a sweep are refused one by one, in its table
            assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
            continue
        assert_refused(done, "error: ")
        assert done.stderr[:-1].isprintable()
    with capsys.disabled():
        print(f"\n{len(lines)} processes in {time.perf_counter() - started:.0f} s, exit statuses {dict(statuses)}")
    assert SAMPLE.exists()
