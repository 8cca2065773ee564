"""A tiny LLaMA as the checkpoints that the tests of loading read, and what they ask of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from harness.basics.errors import UserError
from harness.config.schema import ModelConfig, Weights
from harness.models.architecture import parameters
from harness.models.loading import load_model
from harness.models.locate import locate
from support.runs import ROOT

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")).to_str()


def config(**values: Any) -> ModelConfig:
    return ModelConfig(**{"name": "tiny", **values})


def dummy(seed: int = 0, dtype: torch.dtype = torch.float32, **architecture: Any) -> Any:
    source = locate(config(weights=Weights.dummy, architecture={**TINY, **architecture}))
    return load_model(source, dtype=dtype, seed=seed)


def save(directory: Path, tokenizer: bool = True, **architecture: Any) -> Path:
    """Writes a tiny checkpoint with random weights."""
    dummy(**architecture).save_pretrained(directory)
    if tokenizer:
        (directory / "tokenizer.json").write_text(TOKENIZER)
    return directory


def edit(directory: Path, **values: Any) -> Path:
    """Changes config.json; a value of None removes the key."""
    path = directory / "config.json"
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return directory


def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(1, 41).view(1, 40)).logits


def refused(model: ModelConfig, *words: str) -> UserError:
    """Returns the error of `locate`, after checking that it is one line with all ``words`` in it."""
    with pytest.raises(UserError) as caught:
        locate(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return caught.value


def total(architecture: dict[str, Any]) -> int:
    count = parameters(architecture)
    assert count is not None
    return count.total


def conf(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())


def write_gguf(path: Path) -> Path:
    """Writes the tiny model as a real GGUF file (float32), tokenizer included."""
    from gguf import GGUFWriter

    state = dummy(tie_word_embeddings=True).state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(f"w{i}" for i in range(41)),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * 41)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(2):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        weight = state[ours]
        if "q_proj" in ours or "k_proj" in ours:  # GGUF interleaves the two halves of each head
            heads = weight.shape[0] // 16
            weight = weight.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
