"""Nothing in a dataset or a checkpoint is run, used as a path, or obeyed by a terminal or a spreadsheet."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from support import warm
from support.models import save_model
from support.runs import ROOT, Run, variables

from harness.basics.cells import FORMULA_STARTS
from harness.basics.errors import UserError
from harness.config.schema import ModelConfig, Weights
from harness.engines.base import EngineSettings
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.known_model import KnownModel
from harness.engines.mii.settings import _beyond_mii, end_of_sequence, local_checkpoint
from harness.models.directory import weight_files
from harness.models.loading import load_model
from harness.models.locate import locate
from harness.models.tensors import skeleton
from harness.models.tokenizer import load_tokenizer

Harness = Callable[..., Run]
FORMULAS = (*FORMULA_STARTS, "\t", "\r")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Returns a small Llama with as many tokens as the demo model, whose tokenizer it is to use."""
    return make(tmp_path / "model")


def make(directory: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_model(directory, "llama", torch.float32, num_key_value_heads=4, vocab_size=49152, **sizes)


def edit(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file, made if missing."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def refusal(path: Path, tokenizer: Path, **keys: Any) -> str:
    """Locates and loads what must be refused; returns the line."""
    with pytest.raises(UserError) as caught:
        load_model(locate(ModelConfig("x", str(path), str(tokenizer), **keys)), dtype=torch.float32)
    assert str(caught.value).isprintable()
    return str(caught.value)


# Pickles


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def pickled(model: Path, more: dict[str, Any], legacy: bool = False) -> dict[str, torch.Tensor]:
    """Replaces a model's weights by a pickle of them and of ``more``; returns the weights."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({**weights, **more}, model / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return weights


@pytest.mark.parametrize("legacy", [False, True])
def test_the_tensors_of_a_pickle_are_read_if_asked_for(model: Path, demo_model: Path, legacy: bool) -> None:
    weights = pickled(model, {}, legacy)
    assert "model.allow_pickle=true" in refusal(model, demo_model)
    source = locate(ModelConfig("x", str(model), str(demo_model), allow_pickle=True))
    assert (source.kind, source.pickled) == ("directory", True)
    loaded = load_model(source, dtype=torch.float32).state_dict()
    assert loaded.keys() >= weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_safetensors_are_taken_where_there_are_both(model: Path, demo_model: Path, tmp_path: Path) -> None:
    torch.save({"x": Evil(tmp_path / "mark")}, model / "pytorch_model.bin")
    source = locate(ModelConfig("x", str(model), str(demo_model), allow_pickle=True))
    assert not source.pickled
    load_model(source, dtype=torch.float32)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "index", "empty", "cut"])
def test_a_malicious_pickle_is_not_run(model: Path, demo_model: Path, tmp_path: Path, kind: str) -> None:
    mark, file = tmp_path / "mark", model / "pytorch_model.bin"
    pickled(model, {"x": Evil(mark)}, kind == "legacy")
    if kind == "bare":
        file.write_bytes(pickle.dumps(Evil(mark)))
    if kind == "index":
        file.rename(model / "part.bin")
        edit(model / "pytorch_model.bin.index.json", metadata={}, weight_map={"x": "part.bin"})
    if kind in ("empty", "cut"):
        file.write_bytes(file.read_bytes()[: 100_000 if kind == "cut" else 0])
    assert "which can run code when they are loaded" in refusal(model, demo_model)
    line = refusal(model, demo_model, allow_pickle=True)
    assert line.startswith("model.allow_pickle: ") and "nothing in them was run" in line
    assert "weights_only" not in line  # torch's own words advise to switch it off
    assert not mark.exists()
    if kind == "bare":  # the example is one
        os.system((pickle.loads(file.read_bytes()) and "") or "true")
        assert mark.exists()


def test_engines_that_cannot_read_a_pickle_say_so(model: Path, demo_model: Path, fresh: Callable[..., Any]) -> None:
    pickled(model, {})
    config = fresh(f"model.path={model}", f"model.tokenizer={demo_model}", "model.allow_pickle=true")
    source = locate(config.model)
    settings = EngineSettings(config.engine, config.generation, source, "float16", "cpu")
    with pytest.raises(UserError, match=r"^model\.allow_pickle: true: mii reads safetensors alone"):
        local_checkpoint(settings)
    known = KnownModel.of(source, "float16", max_context=2048)
    choice.check(config.engine, known, "cuda")  # auto takes torch
    config.engine.kernels = Kernels.deepspeed
    with pytest.raises(UserError, match=r"^engine\.kernels: deepspeed: they are loaded from safetensors"):
        choice.check(config.engine, known, "cuda")


@pytest.fixture
def fresh() -> Callable[..., Any]:
    """Returns a function that composes a config."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from harness.config import schema
    from harness.config.compose import to_config
    from harness.engines.catalogue import register

    def composed(*overrides: str) -> schema.Config:
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return to_config(compose("config", list(overrides)))

    return composed


@pytest.mark.slow
def test_pickles_through_the_command(harness: Harness, model: Path, demo_model: Path, tmp_path: Path) -> None:
    job = [f"model.path={model}", f"model.tokenizer={demo_model}", "dataset.num_samples=2"]
    job += ["generation.max_output_len=2", "model.dtype=float32"]
    pickled(model, {})
    run = harness(*job, "model.allow_pickle=true")
    assert (run.status, run.row["status"]) == (0, "ok"), run.stderr
    torch.save({"x": Evil(tmp_path / "mark")}, model / "pytorch_model.bin")
    for override, line in (("false", "error: model.path: "), ("true", "error: model.allow_pickle: ")):
        refused = harness(*job, f"model.allow_pickle={override}", results=tmp_path / override)
        assert refused.status == 2
        assert refused.stderr.startswith(line) and refused.stderr.count("\n") == 1
        assert refused.row["status"] == "invalid"
        assert "model.allow_pickle" in refused.row["error"]
    assert not (tmp_path / "mark").exists()


# Code beside the weights

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "{name}"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass

def generate(*arguments, **named):
    raise SystemError
"""


def armed(model: Path, demo_model: Path, mark: Path, name: str) -> None:
    """Puts code of its own into a checkpoint, wherever transformers looks for some; ``name`` is its family."""
    code = CODE.format(mark=str(mark), name=name)
    (model / "code.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    (model / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    edit(model / "config.json", model_type=name, auto_map=maps, tokenizer_class="Tokenizer")
    tokenizer = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    own = "Tokenizer" if name == "own" else "PreTrainedTokenizerFast"
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ raise_exception('x') }}"
    edit(model / "tokenizer_config.json", tokenizer_class=own, auto_map=tokenizer, chat_template=template)
    (model / "chat_template.jinja").write_text(template)
    edit(model / "generation_config.json", custom_generate="code", auto_map=maps)
    (model / "sitecustomize.py").write_text(code)


@pytest.mark.parametrize("name", ["llama", "own"])
def test_a_checkpoint_s_code_is_not_run(
    model: Path, demo_model: Path, tmp_path: Path, name: str, fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # nobody is asked either
    mark = tmp_path / "mark"
    armed(model, demo_model, mark, name)
    source = locate(ModelConfig("x", str(model)))
    config = fresh()
    settings = EngineSettings(config.engine, config.generation, source, "float32", "cpu")
    calls: list[Callable[[], Any]] = [
        lambda: load_tokenizer(source),
        lambda: load_tokenizer(locate(ModelConfig("x", str(demo_model), str(model)))),
        lambda: load_model(source, dtype=torch.float32),
        lambda: skeleton(source),
        lambda: end_of_sequence(source, settings),
        lambda: list(_beyond_mii(source, None)),
        lambda: load_model(
            locate(ModelConfig("x", str(model), weights=Weights.dummy, architecture={"model_type": "llama"})),
            dtype=torch.float32,
        ),
    ]
    refused = 0
    for call in calls:
        try:
            call()
        except UserError as error:
            assert "code" in str(error)
            refused += 1
        assert not mark.exists()
    assert refused == (0 if name == "llama" else 6)


@pytest.mark.slow
def test_a_checkpoint_s_code_through_the_command(
    harness: Harness, model: Path, demo_model: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    armed(model, demo_model, mark, "own")
    job = [f"model.path={model}", "dataset.num_samples=1", "generation.max_output_len=2", "model.dtype=float32"]
    variables = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    run = harness(*job, **variables)
    assert run.status == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(("error: model.path: ", "error: model.tokenizer: "))
    assert not mark.exists()
    harness(*job, "model.trust_remote_code=true", results=tmp_path / "trusted", **variables)
    assert mark.exists()  # the code is such that it would have been


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "someone/kernels"},
        {"attn_implementation": {"": "sdpa", "text": "someone/kernels@main"}},
        {"text_config": {"experts_implementation": "someone/kernels"}},
    ],
)
def test_kernels_of_a_hub_are_not_fetched_for_a_config(model: Path, demo_model: Path, values: dict[str, Any]) -> None:
    edit(model / "config.json", **values)
    assert "names code to be fetched and run; take it out, or give model.trust_remote_code" in refusal(
        model, demo_model
    )


def test_kernels_of_a_hub_are_not_fetched_for_another_s_config(model: Path, tmp_path: Path) -> None:
    """In a process of its own, since the hub's settings are read when it is imported."""
    edit(model / "config.json", _attn_implementation="someone/kernels")
    place = tmp_path / "hub" / "models--org--tiny"
    (place / "snapshots").mkdir(parents=True)
    model.rename(place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    code = (
        "import torch; from harness.models.source import Source; from harness.models.loading import load_model\n"
        "load_model(Source('hub', 'org/tiny', None, 'org/tiny', {}, False), dtype=torch.float32)"
    )
    here = variables(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=here, capture_output=True, text=True, timeout=120)
    assert "UserError: model.path, org/tiny, _attn_implementation: 'someone/kernels' names code" in done.stderr


# Paths


@pytest.mark.parametrize("name", ["../outside.safetensors", "{elsewhere}", "a/b", "..", "", "a\\b", "a\0b", "./x"])
@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_own_directory_alone(
    model: Path, demo_model: Path, tmp_path: Path, name: str, index: str
) -> None:
    elsewhere = tmp_path / "outside.safetensors"
    (model / "model.safetensors").rename(elsewhere)
    weights = load_file(elsewhere)
    edit(
        model / f"{index}.index.json", metadata={}, weight_map=dict.fromkeys(weights, name.format(elsewhere=elsewhere))
    )
    line = refusal(model, demo_model, allow_pickle=True)
    assert "which is no file of that directory" in line
    # What reads the weights without locate() asks the same function.
    with pytest.raises(UserError, match="no file of that directory"):
        weight_files(model, index)


def test_files_of_a_hub_s_cache_are_links(model: Path, demo_model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    load_model(locate(ModelConfig("x", str(model), str(demo_model))), dtype=torch.float32)


def test_a_checkpoint_names_no_other(model: Path, demo_model: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1.0  # the two differ
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    edit(model / "config.json", _name_or_path=str(other), name_or_path=str(other))
    loaded = load_model(locate(ModelConfig("x", str(model), str(demo_model))), dtype=torch.float32)
    assert torch.equal(loaded.model.norm.weight, weights["model.norm.weight"])
    (model / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    secret = tmp_path / "secret.json"
    secret.write_text("{")
    edit(model / "tokenizer_config.json", tokenizer_file=str(secret), vocab_file=str(secret), name_or_path=str(secret))
    tokenizer = load_tokenizer(locate(ModelConfig("x", str(model))))
    assert (
        tokenizer("hello world").input_ids
        == load_tokenizer(locate(ModelConfig("x", str(demo_model))))("hello world").input_ids
    )
    edit(model / "config.json", transformers_weights="elsewhere.safetensors.index.json")
    assert "names the file of the weights" in refusal(model, demo_model)
    edit(model / "config.json", transformers_weights=None)
    (part := model / "shard-00000-model-00001-of-00001.safetensors").touch()
    assert "one of the parts that transformers would read" in refusal(model, demo_model)
    part.unlink()
    edit(model / "adapter_config.json", base_model_name_or_path=str(other), peft_type="LORA")
    assert "makes it an adapter of another model" in refusal(model, demo_model)


def test_what_an_evaluation_shows_has_no_control_characters() -> None:
    from io import StringIO

    from rich.console import Console

    from harness.accuracy.report import comparison

    screen = Console(file=StringIO(), force_terminal=True, no_color=True)
    comparison(screen, "id\x1b]0;owned", [], ["model.path=a\x9b2J"])
    assert isinstance(screen.file, StringIO)
    shown = screen.file.getvalue()
    assert "\x1b]" not in shown and "\x9b" not in shown and "owned" in shown


def test_a_recorded_config_is_data(tmp_path: Path) -> None:
    from harness.basics.files import yaml_bytes

    evil = ["!!python/object/apply:os.system ['true']", "${oc.env:HOME}", "a\n!!python/name:os.system", "\x1b[2J"]
    path = tmp_path / "config.yaml"
    path.write_bytes(yaml_bytes({"model": {"path": evil[0], "name": evil[1]}, "more": evil}))
    assert OmegaConf.to_container(OmegaConf.load(path), resolve=True) == {
        "model": {"path": evil[0], "name": evil[1]},
        "more": evil,
    }


# Terminals and spreadsheets

NASTY = "=<img src=x onerror=alert(1)>\x1b[2J\x07\r\u202e\u2028 \x1b]0;title\x9b"
PROMPTS = [
    "\x1b[31mred\x1b[2J",
    "a\rb\u2028c\u2029d\x85e\x0b\x0c\x1c\x1d\x1e",
    "nul \x00 bell \x07 back \x08",
    "\u202eright to left\u202c",
    "=cmd|' /C calc'!A0",
    "{{7*7}} ${oc.env:HOME} [bold]x[/] </script><script>alert(1)</script>",
]


def controls(text: str) -> list[str]:
    """Returns what a terminal would obey."""
    return [char for char in text if not char.isprintable() and char != "\n"]


def cells(text: str) -> Iterator[str]:
    """Yields the cells of a CSV."""
    for row in csv.reader(text.splitlines(), strict=True):
        yield from row


@pytest.mark.slow
def test_no_control_character_of_a_name_or_a_prompt_is_obeyed(
    harness: Harness, demo_model: Path, tmp_path: Path
) -> None:
    model = make(tmp_path / NASTY)
    data = tmp_path / f"{NASTY}.json"
    data.write_text(json.dumps([[prompt, 5, 12] for prompt in PROMPTS]))
    results = tmp_path / f"results {NASTY}"

    def word(key: str, value: object) -> str:
        return f"{key}='{value}'"

    job = ["-m", word("model.path", model), f"model.tokenizer={demo_model}", "dataset=asc24"]
    job += [word("dataset.path", data), "model.dtype=float32", "generation.stop=length"]
    done = subprocess.run(
        [warm.interpreter(), "harness/main.py", *job, word("results_dir", results)],
        cwd=ROOT,
        env=variables(),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    run = Run(done.returncode, stdout, stderr, results)
    row = run.row
    assert row["status"] == "ok"
    assert row["model"].startswith("'=<img")
    for text in (stdout, stderr, *((run.directory / name).read_text() for name in ("launch.log", "run.log"))):
        assert controls(text) == [], ascii(text)
    assert "<img" in (run.directory / "launch.log").read_text()
    lines = (run.directory / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(len(PROMPTS)))
    table = (results / "runs.csv").read_text(encoding="utf-8")
    assert controls(table) == []
    assert not [cell for cell in cells(table) if cell.startswith(FORMULAS)]

    # A refusal names the path, and its row has it.
    refused = subprocess.run(
        [warm.interpreter(), "harness/main.py", word("model.path", f"{model}x"), word("results_dir", results)],
        cwd=ROOT,
        env=variables(),
        capture_output=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert controls(refused.stderr.decode()) == [] and refused.stderr.count(b"\n") == 1
    assert not [cell for cell in cells((results / "runs.csv").read_text()) if cell.startswith(FORMULAS)]

    # Tables of others need not be as ours are: names that no run of ours has.
    header, *rows = table.splitlines()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    text = "\n".join([header, rows[0].replace("fastgen", "=fast\x1b[2Jgen"), rows[0].replace(row["run_id"], "=id\x9b")])
    (foreign / "runs.csv").write_text(text + "\n", encoding="utf-8")
    page = tmp_path / "page.html"
    for options in ([], ["--csv"], ["--json"], ["--html", str(page)]):
        shown = subprocess.run(
            [sys.executable, "-m", "harness.compare", str(results), str(foreign), *options],
            cwd=ROOT,
            env=variables(),
            capture_output=True,
            timeout=120,
        )
        output = shown.stdout.decode()
        assert shown.returncode == 0, shown.stderr
        assert controls(output) == [] and controls(shown.stderr.decode()) == [], ascii(output)
        if "--csv" in options:
            assert not [cell for cell in cells(output) if cell.startswith(FORMULAS)]
    html = page.read_text(encoding="utf-8")
    assert "onerror" in html and "<img" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    data_of_page = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, re.S)
    assert data_of_page and "<" not in data_of_page[1]
    json.loads(data_of_page[1])
