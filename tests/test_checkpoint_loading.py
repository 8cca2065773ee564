"""Checkpoints that are loaded, or made up: weights that do not fit, dummy weights, sizes, tokenizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, TOKENIZER, conf, config, dummy, edit, logits, refused, save, total, write_gguf
from support.runs import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from harness.basics.errors import UserError
from harness.config.schema import Weights
from harness.models.architecture import context_length, kv_bytes_per_token, parameters, required_bytes
from harness.models.loading import load_model
from harness.models.locate import locate
from harness.models.tokenizer import ByteTokenizer, load_tokenizer

LLAMA2_TOKENIZER = ROOT.parent / "shared" / "data" / "llama2_tokenizer"


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
    assert len(out[0].argmax(-1).unique()) > 2


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
        ("llama3_1_8b", 8_030_261_248, 131_072),
        ("llama3_1_70b", 70_553_706_496, 327_680),
        ("llama3_2_1b", 1_235_814_400, 32_768),
        ("llama3_2_3b", 3_212_749_824, 114_688),
        ("llama3_3_70b", 70_553_706_496, 327_680),
        ("mistral_7b", 7_248_023_552, 131_072),
        ("phi4", 14_659_507_200, 204_800),
        ("qwen2_5_0_5b", 494_032_768, 12_288),
        ("qwen2_5_1_5b", 1_543_714_304, 28_672),
        ("qwen2_5_3b", 3_085_938_688, 36_864),
        ("qwen2_5_7b", 7_615_616_512, 57_344),
        ("qwen2_5_14b", 14_770_033_664, 196_608),
        ("qwen2_5_32b", 32_763_876_352, 262_144),
        ("qwen3_0_6b", 596_049_920, 114_688),
        ("qwen3_1_7b", 1_720_574_976, 114_688),
        ("qwen3_4b", 4_022_468_096, 147_456),
        ("qwen3_8b", 8_190_735_360, 147_456),
        ("qwen3_14b", 14_768_307_200, 163_840),
        ("qwen3_32b", 32_762_123_264, 262_144),
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
