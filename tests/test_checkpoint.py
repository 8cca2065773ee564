"""Checkpoints: small real ones made here, broken ones, dummy weights, tokenizers, and the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TINY, TOKENIZER, conf, config, dummy, edit, logits, refused, save, total, write_gguf

from harness.config.schema import Weights
from harness.models import demo
from harness.models.loading import load_model
from harness.models.locate import locate, model_name
from harness.models.source import Source
from harness.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


# --- locate: what is found ------------------------------------------------------------------------


def test_directory_is_located_and_loaded(tmp_path: Path) -> None:
    source = locate(config(path=str(save(tmp_path))))
    assert (source.kind, source.path, source.tokenizer) == ("directory", str(tmp_path), str(tmp_path))
    assert source.architecture["rope_parameters"]["rope_theta"] == 20000.0
    model = load_model(source, dtype=torch.bfloat16, attention="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert load_tokenizer(source).vocab_size == 3


def test_sharded_directory(tmp_path: Path) -> None:
    whole = dummy()
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(locate(config(path=str(tmp_path))), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(whole))
    shards[0].rename(tmp_path / "elsewhere")
    refused(config(path=str(tmp_path)), shards[0].name, "missing")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(config(path=str(tmp_path)), "index.json", "weight_map")


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("models/tiny", "./models/tiny/", "~/models/tiny"):  # the first also looks like a hub id
        source = locate(config(path=path))
        assert (source.kind, source.path) == ("directory", str(tmp_path / "models" / "tiny"))


def test_gguf_file_and_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    source = locate(config(path=str(file)))
    assert source == locate(config(path=str(tmp_path)))
    assert (source.kind, source.path, source.gguf_file) == ("gguf", str(tmp_path), "tiny.gguf")
    assert source.tokenizer == str(file)
    expected = {key: value for key, value in TINY.items() if key != "rope_parameters"}
    assert source.architecture == {**expected, "rope_theta": 20000.0, "tie_word_embeddings": True}
    capfd.readouterr()
    model = load_model(source, dtype=torch.float32)
    assert torch.equal(logits(model), logits(dummy(tie_word_embeddings=True)))
    assert not hasattr(model.config, "quantization_config")
    assert len(load_tokenizer(source)) >= 300
    assert capfd.readouterr() == ("", "")


def test_broken_gguf(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for size in (8, 23, 100, 2000, len(whole) - 100_000, len(whole) - 1):
        broken.write_bytes(whole[:size])
        refused(config(path=str(broken)), "broken.gguf", "copy it again")
    for position in (4, 8, 16, 24, 32, 60):  # counts and lengths turned into nonsense
        broken.write_bytes(whole[:position] + b"\xff" * 8 + whole[position + 8 :])
        refused(config(path=str(broken)), "broken.gguf")
    broken.write_bytes(b"PK\x03\x04" + whole[4:])
    refused(config(path=str(broken)), "no GGUF file")
    broken.write_bytes(b"")
    refused(config(path=str(broken)), "no GGUF file")
    refused(config(path=str(tmp_path)), "holds 2 GGUF files", "model.path=")


def test_hub_id_without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # behind a proxy nothing is looked up here
    source = locate(config(path="no-such-org/no-such-model"))
    assert source == Source("hub", "no-such-org/no-such-model", None, "no-such-org/no-such-model", {}, False)


@pytest.mark.slow
def test_hub_offline_and_a_clean_terminal(tmp_path: Path) -> None:
    """Needs a process of its own: the hub's settings are read when it is imported."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123"
    save(snapshot)
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text("0123")
    script = """
import torch
from harness.basics.errors import UserError
from harness.models.loading import load_model
from harness.models.locate import locate
from harness.models.tokenizer import load_tokenizer
from harness.config.schema import ModelConfig
source = locate(ModelConfig(name="x", path="org/tiny"))
load_tokenizer(source)
model = load_model(source, dtype=torch.float32)
print(source.kind, source.architecture["hidden_size"], model.num_parameters())
for load in (load_tokenizer, lambda source: load_model(source, dtype=torch.float32)):
    try:
        load(locate(ModelConfig(name="x", path="org/absent")))
    except UserError as error:
        print(error)
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"hub 64 {total(TINY)}"
    problem = "model.path: org/absent is not in the local cache, and its hub cannot be reached; give the directory"
    assert [line.startswith(problem) for line in lines[1:]] == [True, True]
    assert done.stderr == ""


# --- model_name -----------------------------------------------------------------------------------


def named(**values: Any) -> str:
    """Returns the name of what `locate` finds, under a config called "own"."""
    model = config(**{"name": "own", "architecture": TINY, **values})
    return model_name(model, locate(model))


def test_a_described_checkpoint_has_the_name_of_its_config(tmp_path: Path) -> None:
    path = str(save(tmp_path / "weights"))
    assert named(path=path) == "own"
    assert named(path=path, architecture={}) == "own"
    assert named(path=path, architecture={"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": None}) == "own"
    assert named(path=path, architecture={**TINY, "rms_norm_eps": 1e-6, "max_position_embeddings": 99}) == "own"
    assert named(path=str(write_gguf(tmp_path / "tiny.Q8_0.gguf"))) == "own"
    other_keys = Source("directory", path, None, path, {"model_type": "gpt2", "n_embd": 64, "vocab_size": 300}, False)
    assert model_name(config(name="own", architecture=TINY), other_keys) == "own"


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ],
)
def test_another_checkpoint_has_its_own_name(tmp_path: Path, key: str) -> None:
    architecture = {**TINY, key: TINY[key] * 2}
    directory = save(tmp_path / "weights")
    assert named(path=str(directory), architecture=architecture) == "weights"
    assert named(path=f"{directory}/", architecture=architecture) == "weights"
    (directory / "below").mkdir()
    assert named(path=f"{directory}/below/..", architecture=architecture) == "weights"
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    assert named(path=str(file), architecture=architecture) == "tiny.Q8_0"
    assert named(path=str(tmp_path), architecture=architecture) == "tiny.Q8_0"


def test_missing_key_value_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    path = str(save(tmp_path / "weights", num_key_value_heads=4))
    without = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    assert named(path=path, architecture=without) == "own"
    edit(tmp_path / "weights", num_key_value_heads=None)
    assert named(path=path, architecture=without) == "own"
    assert named(path=path, architecture={**TINY, "num_key_value_heads": 4}) == "own"
    assert named(path=path) == "weights"  # 2 of them
    edit(tmp_path / "weights", num_key_value_heads=2)
    assert named(path=path, architecture=without) == "weights"


def test_names_without_a_checkpoint_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert named(path="no-such-org/no-such-model") == "no-such-model"
    assert named(path="no-such-org/no-such-model", architecture={}) == "no-such-model"
    assert named(weights=Weights.dummy) == "own"
    edit(save(tmp_path / "weights"), hidden_size=128)
    assert named(weights=Weights.dummy, path=str(tmp_path / "weights")) == "own"


def test_name_of_the_demo_model() -> None:
    small, large = conf("smollm2_135m"), conf("llama2_70b")
    assert named(name=small["name"], demo=True, architecture=small["architecture"]) == "smollm2_135m"
    assert named(name=large["name"], demo=True, architecture=large["architecture"]) == demo.NAME


def test_a_checkpoint_alone_is_called_after_its_directory(tmp_path: Path) -> None:
    """No option was chosen: the default describes the demo model, which the path takes the place of."""
    default = {"name": "smollm2_135m", "demo": True, "architecture": conf("smollm2_135m")["architecture"]}
    path = str(save(tmp_path / "weights"))
    assert named(**default, path=path) == "weights"
    assert named(**{**default, "architecture": TINY}, path=path) == "weights"  # of the same sizes or not
    assert named(**default, path=path, weights=Weights.dummy) == "weights"


def test_random_weights_of_a_checkpoint_alone_have_its_shape(tmp_path: Path) -> None:
    path = str(save(tmp_path / "weights", num_hidden_layers=3))
    ours = conf("smollm2_135m")["architecture"]
    found = locate(config(name="smollm2_135m", demo=True, path=path, weights=Weights.dummy, architecture=ours))
    assert found.architecture == locate(config(name="any", path=path)).architecture
    asked = {**ours, "num_hidden_layers": 5}
    found = locate(config(name="smollm2_135m", demo=True, path=path, weights=Weights.dummy, architecture=asked))
    assert (found.architecture["num_hidden_layers"], found.architecture["hidden_size"]) == (5, TINY["hidden_size"])


# --- locate: what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "",
        " ",
        "/no/such/place",
        "a/b/c",
        "no_slash",
        "org/",
        "org/na me",
        "org/x.gguf",
        "nul\0/x",
        "~nobody/x",
    ],
)
def test_no_such_path(path: str) -> None:
    error = refused(config(path=path), "GGUF file")
    assert error.field == "model.path"


def test_no_path_at_all() -> None:
    refused(config(), "model.path: not set", "model.weights=dummy")


def test_name_too_long() -> None:
    refused(config(path="/" + "x" * 5000), "model.path")


def test_pickled_weights(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(config(path=str(tmp_path)), "pytorch_model.bin", "can run code", "safetensors", "model.allow_pickle=true")


def test_empty_directory_and_file_of_another_kind(tmp_path: Path) -> None:
    refused(config(path=str(tmp_path)), "neither model.safetensors nor a GGUF file")
    (tmp_path / "notes.txt").write_text("hello")
    refused(config(path=str(tmp_path / "notes.txt")), "notes.txt", "no GGUF file")


def test_missing_config_and_tokenizer(tmp_path: Path) -> None:
    save(tmp_path, tokenizer=False)
    refused(config(path=str(tmp_path)), "model.tokenizer", "no tokenizer files")
    (tmp_path / "config.json").unlink()
    refused(config(path=str(tmp_path)), "no config.json")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type"),
        ("\xff\xfe", "not JSON"),
    ],
)
def test_broken_config(tmp_path: Path, text: str, word: str) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(config(path=str(tmp_path)), "config.json", word)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", 66),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("vocab_size", 300.5),
        ("max_position_embeddings", None),
        ("head_dim", 15),
        ("rms_norm_eps", "x"),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", -1.0),
    ],
)
def test_impossible_sizes(tmp_path: Path, key: str, value: object) -> None:
    save(tmp_path)
    edit(tmp_path, **{"head_dim": None, key: value})
    refused(config(path=str(tmp_path)), "config.json", key)
    refused(config(weights=Weights.dummy, architecture={**TINY, key: value}), "model.architecture", key)


def test_broken_safetensors(tmp_path: Path) -> None:
    weights = save(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    for data, word in (
        (b"", "cut short"),
        (whole[:5], "cut short"),
        (whole[:500], "cut short"),
        (whole[:-1], f"should have {len(whole)} bytes and has {len(whole) - 1}"),
        (whole + b"x", "should have"),
        (whole[:8] + b"!" + whole[9:], "header"),
        ((2).to_bytes(8, "little") + b"[]", "header"),
        ((2).to_bytes(8, "little") + b"{}", "header"),
        ((29).to_bytes(8, "little") + b'{"a": {"data_offsets": "xy"}}', "header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ):
        weights.write_bytes(data)
        refused(config(path=str(tmp_path)), "model.safetensors", word)
