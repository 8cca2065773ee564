"""The weights that DeepSpeed's ragged engine is given: read, made up, packed, and refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ragged
from support.deepspeed_kernels import CPU
from support.ragged import (
    ROUNDING,
    TINY,
    Judge,
    float_quantize,
    generate,
    loaded,
    requests,
    save,
    settings,
)
from torch import Tensor

from harness.basics.errors import UserError
from harness.engines.fastgen.runners import deepspeed_runner
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner
from harness.engines.fastgen.runners.deepspeed_weights import Weights
from harness.models.directory import find
from harness.models.source import Source

kernels, tiny = ragged.kernels, ragged.tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def read(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = list(Weights(source, dtype, CPU, CPU).parameters())
    assert len(dict(weights)) == len(weights)
    return dict(weights)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_directorys_shards_are_read_whole(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    save(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    # What older checkpoints hold besides: rotary frequencies, and a head of their own that tying overrides.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    if tied:
        extra["lm_head.weight"] = torch.ones(320, 512)
    save_file(load_file(shards[0]) | extra, shards[0], {"format": "pt"})
    found = read(find(str(tmp_path), False, need_weights=True), torch.float16)
    assert_same(found, model.state_dict())
    assert (found["lm_head.weight"] is found["model.embed_tokens.weight"]) is tied


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    from support.checkpoints import write_gguf

    from harness.models import loading

    source = find(str(write_gguf(tmp_path / "tiny.gguf")), False, need_weights=True)
    weights = Weights(source, torch.float32, CPU, CPU)
    found = dict(weights.parameters())
    assert_same(found, loading.load_model(source, dtype=torch.float32).state_dict())
    assert not weights.state
    assert {parameter.device.type for parameter in weights.model.parameters()} == {"meta"}


def test_dummy_weights_depend_on_their_names_alone() -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    source = Source(
        "dummy", None, None, None, {"model_type": "qwen2", **TINY, "quantization_config": {"bits": 4}}, False
    )
    found = read(source, torch.bfloat16)
    expected = AutoModelForCausalLM.from_config(Qwen2Config(**TINY)).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_same(read(source, torch.bfloat16), found)
    layers = [found[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in (0, 1)]
    assert not layers[0].equal(layers[1])
    assert 0.019 < float(layers[0].float().std()) < 0.021
    assert found["model.norm.weight"].eq(1).all()
    assert found["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    tied = read(Source("dummy", None, None, None, {"model_type": "llama", **TINY, "tie_word_embeddings": True}, False))
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]


def test_dummy_weights_run(kernels: None) -> None:
    found, _ = generate(loaded(settings(None, "bfloat16")), requests(6), 64)
    assert all(completion.output_tokens == len(completion.token_ids) for completion in found.values())


def test_weights_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, words in (
        ({n: t for n, t in weights.items() if n != name}, f"lacks weights: 1, for example {name}"),
        (weights | {name: torch.ones(3, 512)}, f"of another shape than its config says: 1, for example {name}"),
        (weights | {"model.layers.2.x": torch.ones(3)}, "no place for: 1, for example model.layers.2.x"),
    ):
        shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"^model\.path: .*{re.escape(words)}"):
            read(find(str(tmp_path), False, need_weights=True))


def test_pickles_are_never_read(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor its index"):
        read(Source("directory", str(tmp_path), None, None, {}, False))


def test_packed_weights_move_with_all_their_parts() -> None:
    from deepspeed.inference.v2.inference_parameter import InferenceParameter

    packed = InferenceParameter.initialize(torch.ones(4, dtype=torch.uint8), scales=torch.ones(2, dtype=torch.float16))
    moved = packed.to("meta")
    assert isinstance(moved, InferenceParameter)
    assert moved.device.type == moved.scales.device.type == "meta"


def test_fp6_weights_are_packed_on_the_host_and_used(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.inference.v2.modules.implementations.linear import fp_quantize

    monkeypatch.setitem(sys.modules, "qtorch", types.ModuleType("qtorch"))
    monkeypatch.setitem(sys.modules, "qtorch.quant", types.SimpleNamespace(float_quantize=float_quantize))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=8))
    directory = save(tmp_path, dtype=torch.bfloat16)  # the packing takes float16 and does not convert
    judge = Judge(directory)
    jobs = requests(8)
    runner = loaded(settings(directory, quantization="wf6af16"))
    packed = runner.policy.model._transformer[0].qkv_w
    assert packed.dtype is torch.uint8 and packed.scales.shape == (768, 1)
    found, _ = generate(runner, jobs, 64)
    ids = {index: completion.token_ids for index, completion in found.items()}
    assert judge.worst_gap(jobs, ids) > 0.1  # six bits are not sixteen
    for name, weight in judge.model.named_parameters():
        if "proj" in name:
            values, scales = fp_quantize(weight.data.half())
            weight.data = values.float() * scales.float()
    assert judge.worst_gap(jobs, ids) < ROUNDING["float16"]


@pytest.mark.parametrize(("quantization", "place"), [(None, "cuda:3"), ("wf6af16", "cpu")])
def test_only_weights_to_be_packed_stay_on_the_host(
    kernels: None, monkeypatch: pytest.MonkeyPatch, quantization: str | None, place: str
) -> None:
    asked: list[Any] = []

    def weights(*arguments: Any) -> None:
        asked.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr(deepspeed_runner, "Weights", weights)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    chosen = dataclasses.replace(settings(None, quantization=quantization), device="cuda:3")
    with pytest.raises(InterruptedError):
        DeepSpeedRunner(chosen).load()
    device = torch.device("cuda:3")
    assert asked == [device, chosen.source, torch.float16, device, torch.device(place)]
