"""Checkpoints that are read module by module hold what transformers makes of them; others are left to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit, save

from harness.models.directory import find
from harness.models.loading import load_model
from harness.models.source import Source
from harness.models.tensors import HEAD, plain


def source_of(directory: Path) -> Source:
    return find(str(directory), False, need_weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "architecture",
    [{}, {"model_type": "qwen2"}, {"model_type": "qwen3", "tie_word_embeddings": True}, {"attention_bias": True}],
    ids=str,
)
def test_modules_have_the_weights_that_transformers_gives_them(
    tmp_path: Path, architecture: dict[str, Any], dtype: torch.dtype
) -> None:
    source = source_of(save(tmp_path, tokenizer=False, **architecture))
    checkpoint = plain(source)
    assert checkpoint is not None
    names = ["model.embed_tokens", "model.norm", *(f"model.layers.{layer}" for layer in range(2))]
    for name in [*names, *([] if checkpoint.tied else ["lm_head"])]:
        checkpoint.read(name, dtype)
    found = checkpoint.model.state_dict()
    if checkpoint.tied:
        assert found.pop(HEAD).device.type == "meta"
    expected = load_model(source, dtype=dtype).state_dict()
    for name, weight in found.items():
        assert weight.dtype is dtype and torch.equal(weight, expected[name]), name


def test_made_up_weights_are_read_as_they_are_loaded(tmp_path: Path) -> None:
    source = Source("dummy", None, None, None, source_of(save(tmp_path, tokenizer=False)).architecture, False)
    checkpoint = plain(source)
    assert checkpoint is not None
    checkpoint.read("model.layers.1", torch.bfloat16)
    expected = load_model(source, dtype=torch.bfloat16).model.layers[1].state_dict()
    for name, weight in checkpoint.model.model.layers[1].state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_what_is_unusual_is_left_to_transformers(tmp_path: Path) -> None:
    usual = source_of(save(tmp_path / "usual", tokenizer=False))
    assert plain(usual) is not None
    for change in ({"pickled": True}, {"trust_remote_code": True}, {"kind": "hub"}, {"kind": "gguf"}):
        assert plain(replace(usual, **change)) is None
    for facts in ({"quantization_config": {"quant_method": "fp8"}}, {"model_type": "granite"}):
        assert plain(replace(usual, architecture=usual.architecture | facts)) is None
    assert plain(source_of(edit(save(tmp_path / "other", tokenizer=False), vocab_size=301))) is None


def test_other_names_are_left_to_transformers(tmp_path: Path) -> None:
    """As the model without its head is saved by itself."""
    whole = load_model(source_of(save(tmp_path, tokenizer=False, tie_word_embeddings=True)), dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    source = source_of(tmp_path)
    assert plain(source) is None
    loaded = load_model(source, dtype=torch.float32)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), whole.parameters(), strict=True))
