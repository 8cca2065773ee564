"""What a model costs: sizes and FLOPs against Hugging Face's own models, memory, lengths, bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from support.runs import ROOT

from harness.basics.errors import UserError
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs import bounds, lengths
from harness.costs.bounds import COMPUTE, LINK, MEMORY, Limits
from harness.costs.lengths import CLAIMED, GUESSED, Length, Lengths
from harness.costs.memory import Memory, Needs, activation_bytes, held
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork
from harness.workload.records import Request

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {  # heads of other sizes than hidden / heads, biases, tied embeddings, fused matrices
    "qwen3": {"head_dim": 32, "attention_bias": True},
    "qwen3/tied": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"head_dim": 32},
    "gemma/untied": {"head_dim": 32, "tie_word_embeddings": False},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "phi3": {},
    "llama": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 48},
    "qwen2": {},
}
CONFIGS = {path.stem: yaml.safe_load(path.read_text())["architecture"] for path in (ROOT / "conf/model").glob("*.yaml")}
TOKENS = 8


def saved(name: str) -> dict[str, Any]:
    """Returns what ``config.json`` says of a family's tiny model, or of an option in ``conf/model``."""
    from transformers import AutoConfig

    settings = CONFIGS.get(name) or SIZES | FAMILIES[name] | {"model_type": name.split("/")[0]}
    family, keys = settings["model_type"], {key: value for key, value in settings.items() if key != "model_type"}
    found: dict[str, Any] = json.loads(AutoConfig.for_model(family, **keys).to_json_string())
    return found


@pytest.mark.parametrize("name", [*FAMILIES, *CONFIGS])
def test_sizes_and_flops_are_those_of_the_real_model(name: str, scale: Callable[..., Any]) -> None:
    """On the meta device: parameters, linear layers, keys and values as the layers make them, FLOPs as torch counts.

    These of all layers, or of the first two in the tier of minutes.
    """
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = saved(name)
    shape = ModelShape.of(architecture, "bfloat16")
    config = AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16)
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert shape.head == linear.pop("lm_head").weight.numel()
    assert shape.matmul == sum(module.weight.numel() for module in linear.values())
    stored = sum(linear[name].out_features for name in linear if name.endswith((".k_proj", ".v_proj")))
    fused = [module.out_features for name, module in linear.items() if name.endswith("qkv_proj")]
    stored += sum(fused) - len(fused) * shape.heads * shape.head_dim
    assert shape.kv_token_bytes == 2 * stored
    if name in CONFIGS:
        assert ModelShape.of(CONFIGS[name], "bfloat16") == shape
    layers = scale(len(model.model.layers), len(model.model.layers), 2)
    model.model.layers = model.model.layers[:layers]
    shape = ModelShape.of(architecture | {"num_hidden_layers": layers}, "bfloat16")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    work = PassWork(TOKENS, TOKENS, 0, 1, logit_rows=TOKENS, kv_read_tokens=TOKENS, attention_pairs=TOKENS**2)
    # transformers 5.17 has angles from a product of matrices, later ones by multiplying: no part of the model's work.
    angles = sum(sum(of.values()) for module, of in counter.get_flop_counts().items() if module.endswith("rotary_emb"))
    assert Limits.of(shape, MACHINE, "bfloat16", 1).flops(work) == pytest.approx(counter.get_total_flops() - angles)


MACHINE = HardwareConfig(
    name="made",
    accelerator=Accelerator.cuda,
    peak_flops={"bfloat16": 1e12, "float16": 1e12},
    memory_bytes=10**9,
    memory_bandwidth=1e10,
    interconnect_bandwidth=1e9,
)
SMALL = {**SIZES, "model_type": "llama", "tie_word_embeddings": False}


def test_bits_change_bytes_and_nothing_else() -> None:
    whole, packed = ModelShape.of(SMALL, "float16"), ModelShape.of(SMALL, "float16", 4, 8)
    assert packed.matrix_bytes == whole.matrix_bytes / 4 == packed.matmul / 2
    assert packed.kv_token_bytes == whole.kv_token_bytes / 2 == 2 * 2 * 2 * 16
    assert packed.other_bytes == whole.other_bytes == 2 * (packed.total - packed.matmul)


@pytest.mark.parametrize("architecture", [{}, {"model_type": "gpt_neox", "hidden_size": 64}, {"model_type": "gemma"}])
def test_a_shape_of_unknown_sizes_is_refused(architecture: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the sizes of model_type .* are not known; give a checkpoint"):
        ModelShape.of(architecture, "float16")


# --- lengths ---


def test_lengths_are_what_the_dataset_says_or_a_guess() -> None:
    stated = lengths.of([Request(0, "", 5, claimed_prompt_len=10), Request(1, "", 4, prompt_ids=(1, 2, 3))])
    assert stated == Lengths([Length(10, 5), Length(3, 4)], CLAIMED, 0)
    guessed = lengths.of([Request(0, "x" * 30, None, reply="y" * 9), Request(1, "", 4, prompt_ids=(1,))])
    assert (guessed.items, guessed.source) == ([Length(10, 3), Length(1, 4)], GUESSED)
    capped = lengths.of([Request(0, "", 50, claimed_prompt_len=10)] * 2, context=20, most_output=10)
    assert capped.items == [Length(10, 10)] * 2
    assert lengths.of([Request(0, "", 50, claimed_prompt_len=10)], context=20).rejected == 1


def test_work_is_what_the_passes_add_up_to() -> None:
    """Against a loop over single steps: prompts whole, then one token at a time, the last one never fed."""
    items = [Length(3, 4), Length(2, 1), Length(1, 3)]
    found = Lengths(items, CLAIMED, 0)
    seen = [[prompt + step for step in range(1, output)] for prompt, output in items]
    decode = found.decode
    assert decode.tokens == decode.logit_rows == sum(map(len, seen)) == 5
    assert decode.kv_read_tokens == decode.attention_pairs == sum(map(sum, seen))
    assert found.prefill == PassWork(6, 6, 0, 3, 3, 6, 6 + 3 + 1)
    assert found.held == [2, 3, 6] and found.mean_held == 11 / 3 and found.p99_held == 6
    assert Lengths([Length(n, 1) for n in range(1, 201)], CLAIMED, 0).p99_held == 198


# --- memory ---


def test_a_rank_holds_weights_activations_and_the_cache_that_the_engine_makes() -> None:
    shape = ModelShape.of(SMALL, "float16")
    needs = Needs(sharded=8000, whole=1000, token=64, kv_heads=2, tokens=10, part=0.5, most=10**6)
    found = held(needs, Memory(100_000, False, 500), tp=2, ranks=4, activations=700)
    assert (found.size, found.own, found.weights, found.token) == (100_000, 500, 5000, 32)
    assert found.cache == (100_000 - 500 - 5000) // 2 and found.most_cache == 100_000 - 500 - 5000 - 700
    assert found.left == 100_000 - 500 - 5000 - 700 - found.cache
    assert found.tokens == found.cache // 32
    shared = held(needs, Memory(100_000, True, 500), tp=2, ranks=4, activations=700)
    assert shared.size == 25_000
    nothing = held(needs, Memory(5_000, False, 500), tp=1, ranks=1, activations=700)
    assert (nothing.cache, nothing.most_tokens) == (0, 0) and nothing.left < 0
    # 3 hidden states and the MLP's three, of 2 bytes; logits twice.
    assert activation_bytes(shape, 10, 3, 1) == 10 * (3 * 64 + 3 * 112) * 2 + 3 * 320 * 6
    assert activation_bytes(shape, 10, 3, 2) == 10 * (3 * 64 + 3 * 56) * 2 + 3 * 320 * 6


# --- bounds ---


def test_each_resource_takes_what_its_work_takes() -> None:
    shape = ModelShape.of(SMALL, "float16")
    limits = Limits.of(shape, MACHINE, "float16", 2)
    work = PassWork(10, 8, 2, 3, logit_rows=3, kv_read_tokens=50, attention_pairs=70)
    found = limits.seconds(work, passes=4)
    flops = (2 * shape.matmul * 10 + 2 * shape.head * 3 + 4 * 2 * 4 * 16 * 70) / 2
    moved = 4 * (shape.matrix_bytes + 2 * shape.head) / 2 + shape.kv_token_bytes / 2 * 60
    assert found[COMPUTE] == pytest.approx(flops / 1e12 / bounds.MATRIX_SHARE)
    assert found[MEMORY] == pytest.approx(moved / 1e10 / bounds.MEMORY_SHARE)
    assert found[LINK] == pytest.approx(2 * 2 * 64 * 2 * 10 * 2 * (2 - 1) / 2 / 1e9)  # a ring of two, twice a layer
    assert Limits.of(shape, MACHINE, "float16", 1).seconds(work)[LINK] == 0


def hardware(name: str) -> HardwareConfig:
    found = yaml.safe_load((ROOT / "conf/hardware" / f"{name}.yaml").read_text())
    known = {key: value for key, value in found.items() if key in HardwareConfig.__dataclass_fields__}
    return HardwareConfig(**known | {"accelerator": Accelerator(found["accelerator"])})


def test_the_bound_of_70b_on_a100s_is_the_published_optimum() -> None:
    """NanoFlow's 1857 total tokens/s a GPU (arXiv 2408.12757), within 5%; the sheet's own peak is above it."""
    limits = Limits.of(ModelShape.of(CONFIGS["llama2_70b"], "float16"), hardware("a100_80g"), "float16", 8)
    requests = Lengths([Length(512, 512)] * 1000, CLAIMED, 0)
    found = bounds.bounds(limits, requests, 1, 1000.0)["mix"]
    assert found.binds == COMPUTE
    assert found.total_tokens_per_s / 8 == pytest.approx(1857, rel=0.05)
    assert found.output_tokens_per_s == found.total_tokens_per_s / 2


def test_what_binds_follows_the_work() -> None:
    shape = ModelShape.of(CONFIGS["llama2_70b"], "float16")
    limits = Limits.of(shape, hardware("a100_80g"), "float16", 8)
    requests = Lengths([Length(512, 512)] * 1000, CLAIMED, 0)
    few = bounds.bounds(limits, requests, 1, 8.0)
    assert few["decode"].binds == MEMORY and few["prefill"].binds == COMPUTE
    assert few["decode"].seconds[MEMORY] > bounds.bounds(limits, requests, 1, 64.0)["decode"].seconds[MEMORY]
    lone = bounds.bounds(limits, Lengths([Length(10, 100)], CLAIMED, 0), 4, 64.0)["mix"]
    assert lone.seconds[MEMORY] >= 99 * limits.seconds(PassWork(1, 0, 1, 1, 1, 11, 11))[MEMORY] * 0.9
    slow = HardwareConfig(**{**hardware("a100_80g").__dict__, "interconnect_bandwidth": 1e9})
    assert bounds.bounds(Limits.of(shape, slow, "float16", 8), requests, 1, 64.0)["mix"].binds == LINK
    half = bounds.bounds(limits, requests, 2, 64.0)["mix"]
    assert half.seconds[COMPUTE] == bounds.bounds(limits, requests, 1, 64.0)["mix"].seconds[COMPUTE] / 2
    no_decode = bounds.bounds(limits, Lengths([Length(8, 1)], CLAIMED, 0), 1, 1.0)
    assert "decode" not in no_decode and no_decode["mix"].output_tokens == 1


def test_a_typical_pass_has_the_mix_of_the_dataset() -> None:
    requests = Lengths([Length(300, 101)] * 50, CLAIMED, 0)  # three prompt tokens a decode step
    full = bounds.typical_pass(requests, 400, 1000.0)
    assert (full.tokens, full.prompt_tokens, full.decode_tokens) == (400, 300, 100)
    assert full.logit_rows == 101 and full.kv_read_tokens == 100 * 350.5 + 300
    few = bounds.typical_pass(requests, 400, 10.0)
    assert (few.tokens, few.decode_tokens) == (40, 10)
    assert bounds.typical_pass(Lengths([Length(300, 1)], CLAIMED, 0), 64, 1.0).prompt_tokens == 64
    assert bounds.sequences_at_once(requests, 3505) == 10 and bounds.sequences_at_once(requests, 10**9, 7) == 7


@pytest.mark.parametrize("missing", ["memory_bandwidth", "interconnect_bandwidth", "peak_flops"])
def test_a_machine_without_a_figure_has_no_bound(missing: str) -> None:
    machine = HardwareConfig(**{**MACHINE.__dict__, missing: {} if missing == "peak_flops" else None})
    with pytest.raises(UserError, match=f"hardware.{missing}.*: not known of made; give "):
        Limits.of(ModelShape.of(SMALL, "float16"), machine, "float16", 2)
