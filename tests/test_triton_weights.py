"""Weights read in parts: merged buffers against Hugging Face's, a rank's slices alone, and nothing held on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import SIZES, save_model
from torch import Tensor

from harness.basics.errors import UserError
from harness.engines.fastgen.runners.triton.shard import Shard
from harness.engines.fastgen.runners.triton.weights import Weights, empty, parts
from harness.models import made_up
from harness.models.directory import find
from harness.models.loading import load_model
from harness.models.source import Source
from harness.models.tensors import Checkpoint, Part

CPU = torch.device("cpu")
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    ("mistral", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 331}),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
]


def filled(source: Source, rank: int = 0, tp: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Weights, int]:
    checkpoint = Checkpoint(source)
    shard = Shard.of(checkpoint.model.config.to_dict(), rank, tp)
    weights = empty(shard, checkpoint.shapes, dtype, CPU)
    for tensor in tensors(weights):
        tensor.fill_(float("nan"))
    return weights, checkpoint.fill(parts(weights, shard, checkpoint.shapes))


def tensors(weights: Weights) -> list[Tensor]:
    found = [weights.embedding, weights.norm, weights.head]
    for layer in weights.layers:
        found += [layer.qkv, layer.output, layer.gate_up, layer.down, layer.attention_norm, layer.mlp_norm]
        found += [one for one in (layer.qkv_bias, layer.output_bias, *(layer.head_norms or ())) if one is not None]
    return found


def check(model: Any, ranks: list[Weights], kv_heads: int) -> None:
    """Compares the ranks' parts, put together, with Hugging Face's model."""
    decoder, tp = model.model, len(ranks)
    for weights in ranks:
        assert torch.equal(weights.embedding, decoder.embed_tokens.weight)
        assert torch.equal(weights.norm, decoder.norm.weight)
    assert torch.equal(torch.cat([weights.head for weights in ranks]), model.lm_head.weight)
    for number, layer in enumerate(decoder.layers):
        own = [weights.layers[number] for weights in ranks]
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        queries = attention.q_proj.out_features // tp
        keys = max(1, kv_heads // tp) * head_dim
        for name in ("weight", "bias"):
            whole = [getattr(one, "qkv" if name == "weight" else "qkv_bias") for one in own]
            if getattr(attention.q_proj, name) is None:
                assert whole == [None] * tp
                continue
            split = [one.split([queries, keys, keys]) for one in whole]
            for place, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                copies = 1 if place == 0 else max(1, tp // kv_heads)  # ranks that have the same key-value head
                assert torch.equal(torch.cat([one[place] for one in split[::copies]]), getattr(projection, name))
                assert all(torch.equal(split[rank][place], split[rank // copies * copies][place]) for rank in range(tp))
        assert torch.equal(torch.cat([one.output for one in own], 1), attention.o_proj.weight)
        assert torch.equal(torch.cat([one.down for one in own], 1), mlp.down_proj.weight)
        gate_up = [one.gate_up.chunk(2) for one in own]
        assert torch.equal(torch.cat([gate for gate, _ in gate_up]), mlp.gate_proj.weight)
        assert torch.equal(torch.cat([up for _, up in gate_up]), mlp.up_proj.weight)
        biases = [one.output_bias for one in own]
        assert biases[1:] == [None] * (tp - 1)
        assert attention.o_proj.bias is None or torch.equal(biases[0], attention.o_proj.bias)
        if own[0].head_norms is not None:
            assert torch.equal(own[-1].head_norms[0], attention.q_norm.weight)
            assert torch.equal(own[-1].head_norms[1], attention.k_norm.weight)
        assert torch.equal(own[-1].attention_norm, layer.input_layernorm.weight)
        assert torch.equal(own[-1].mlp_norm, layer.post_attention_layernorm.weight)


@pytest.mark.parametrize(("family", "more"), MODELS, ids=str)
def test_the_ranks_have_every_weight_between_them(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    source = find(str(save_model(tmp_path, family, torch.float32, **{**SIZES, **more})), False, need_weights=True)
    model = load_model(source, dtype=torch.float32)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for tp in (1, 2, 4, 8):
        if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0):
            ranks = [filled(source, rank, tp) for rank in range(tp)]
            check(model, [weights for weights, _ in ranks], kv_heads)
            for weights, read in ranks:  # each element once, a tied head not at all
                tied = weights.head if model.config.tie_word_embeddings else weights.head[:0]
                assert read == sum(one.numel() for one in tensors(weights)) * 4 - tied.numel() * 4


def test_made_up_weights_are_the_same_in_parts(tmp_path: Path) -> None:
    source = Source("dummy", None, None, None, {"model_type": "qwen2", **SIZES, "num_attention_heads": 8}, False)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(source, dtype=dtype)
        check(model, [filled(source, rank, 2, dtype)[0] for rank in range(2)], SIZES["num_key_value_heads"])


def test_made_up_weights_are_numbers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.empty(512, 384)
    made_up.draw("a", whole, (512, 384))
    assert abs(whole.mean()) < 2e-4 and abs(whole.std() - made_up.DEVIATION) < 2e-4
    assert torch.linalg.matrix_norm(whole, 2) < 1.05 * made_up.DEVIATION * (512**0.5 + 384**0.5)  # as random ones have
    others = [torch.empty(512, 384) for _ in range(2)]
    made_up.draw("b", others[0], (512, 384))
    made_up.draw("a", others[1], (512, 384), seed=1)
    for other in others:
        assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.01
    monkeypatch.setattr(made_up, "PIECE", 1000)
    part = torch.empty(512, 7)
    made_up.draw("a", part, (512, 384), 1, 100)
    assert torch.equal(part, whole[:, 100:107])


def test_the_host_holds_no_more_than_a_slice(tmp_path: Path) -> None:
    """Of weights that go to a device, here one that keeps nothing."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    source = find(str(save_model(tmp_path, "llama", torch.bfloat16, **sizes)), False, need_weights=True)
    checkpoint = Checkpoint(source)
    shard = Shard.of(checkpoint.model.config.to_dict(), 1, 2)
    weights = empty(shard, checkpoint.shapes, torch.float16, torch.device("meta"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        checkpoint.fill(parts(weights, shard, checkpoint.shapes))
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    mapped = (tmp_path / "model.safetensors").stat().st_size  # whose pages the system may drop
    assert peak <= mapped + max(tensor.numel() for tensor in tensors(weights)) * 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("lacks", "lacks weights: 1, for example model.norm.weight"),
        ("more", "has weights that its config has no place for: 1, for example model.extra.weight"),
        ("shape", "has weights of another shape than its config says: 1, for example model.norm.weight"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: str, line: str) -> None:
    directory = save_model(tmp_path, "llama", torch.float32, **SIZES)
    file = directory / "model.safetensors"
    stored = load_file(file)
    if change == "more":
        stored["model.extra.weight"] = torch.zeros(1)
    else:
        norm = stored.pop("model.norm.weight")
        if change == "shape":
            stored["model.norm.weight"] = norm[:-1].clone()
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(UserError) as refused:
        Checkpoint(find(str(directory), False, need_weights=True))
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_weights_in_several_files(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama", torch.float32, **SIZES)
    source = find(str(directory), False, need_weights=True)
    whole, _ = filled(source)
    stored = load_file(directory / "model.safetensors")
    names = sorted(stored)
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({name: stored[name] for name in some}, directory / f"{number}.safetensors", {"format": "pt"})
    index = {"weight_map": {name: f"{place % 2}.safetensors" for place, name in enumerate(names)}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    split, _ = filled(find(str(directory), False, need_weights=True))
    assert all(torch.equal(*pair) for pair in zip(tensors(split), tensors(whole), strict=True))
    to = torch.empty(3, SIZES["hidden_size"])
    assert (
        Checkpoint(find(str(directory), False, need_weights=True)).fill([Part("lm_head.weight", to, 0, 5)])
        == to.numel() * 4
    )
    assert torch.equal(to, stored["lm_head.weight"][5:8])
