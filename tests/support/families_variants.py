"""Known traps: settings that checkpoints of a family have, and its plain config has not. See ``families.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TRAINED = 32  # positions that the models with scaled rotary embeddings were trained with, of 128
THETA = 10_000.0

_LONG = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "short_factor": [1.0 + 0.05 * pair for pair in range(8)],
    "long_factor": [1.0 + 0.6 * pair for pair in range(8)],
    "original_max_position_embeddings": TRAINED,
}
_ROTARY: dict[str, dict[str, Any]] = {
    "longrope": _LONG,
    "dynamic": {
        "rope_type": "dynamic",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
}
# Families for each way to scale; those whose heads are rotated in part would need factors of another length.
_SCALED = {
    "longrope": "llama mistral qwen2 qwen3 granite olmo2 phi3 phimoe smollm3",
    "dynamic": "llama mistral qwen2 qwen3 falcon gpt_neox phi stablelm cohere olmo starcoder2 gemma persimmon",
    "yarn": "llama mistral qwen2 qwen3 olmo2 deepseek_v3 qwen3_moe ministral3 apertus",
    "llama3": "llama granite smollm3 arcee",
    "linear": "llama qwen2 gemma falcon",
}
_OTHERS: dict[str, dict[str, Any]] = {
    "bloom/residual after norm": {"apply_residual_connection_post_layernorm": True},
    "cohere/qk norm": {"use_qk_norm": True},
    "falcon/alibi": {"alibi": True},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/sequential": {"parallel_attn": False, "bias": True},
    # Only a config with its lengths elsewhere than at the top lets requests past them: others are cut at 32.
    "got_ocr2/dynamic": {"text_config": {"max_position_embeddings": TRAINED, "rope_parameters": _ROTARY["dynamic"]}},
    "gpt2/scaled": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt2/unscaled": {"scale_attn_weights": False},
    "gpt_bigcode/many heads": {"multi_query": False},
    "gpt_neox/sequential": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "granite/multipliers": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.5,
    },
    "llama/bias": {"attention_bias": True, "mlp_bias": True},
    "llama/head_dim": {"head_dim": 32},
    "llama/old rotary keys": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
    "llama/partly rotated": {
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
    },
    "llama/tied": {"tie_word_embeddings": True},
    "mixtral/many experts": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "mpt/no alibi": {"attn_config": {"alibi": False, "attn_impl": "eager", "clip_qkv": 0.5, "qk_ln": False}},
    "olmo/clip": {"clip_qkv": 0.5},
    "opt/350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "persimmon/no qk norm": {"qk_layernorm": False},
    "phi/qk norm": {"qk_layernorm": True},
    "qwen2/tied": {"tie_word_embeddings": True},
    "smollm3/all rotated": {"no_rope_layers": [1, 1, 1, 1]},
    "stablelm/qk norm": {"qk_layernorm": True, "use_qkv_bias": True},
    "stablelm/parallel": {"use_parallel_residual": True},
    "xlm/causal": {"causal": True},
}


def of(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants of a family: name, and settings that its plain config has not."""
    for kind, families in _SCALED.items():
        if family in families.split():
            more = {"original_max_position_embeddings": TRAINED} if family in ("phi3", "phimoe") else {}
            mscales = {"short_mscale": 1.2, "long_mscale": 1.3} if family == "phimoe" else {}
            yield kind, {"rope_parameters": {**_ROTARY[kind], **_partly(family), **mscales}, **more}
    for name, settings in _OTHERS.items():
        if name.split("/")[0] == family:
            yield name.split("/")[1], settings


def _partly(family: str) -> dict[str, float]:
    """Returns how much of a head the family rotates, where its plain config says so among the rotary settings."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    rotary = CONFIG_MAPPING[family]().to_dict().get("rope_parameters") or {}
    return {key: rotary[key] for key in ("partial_rotary_factor",) if rotary.get(key) is not None}
