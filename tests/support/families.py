"""A tiny random model of each causal LM that the installed transformers has, and of known traps among their configs.

A family is a ``model_type``; an entry ``family/variant`` is one whose config is set as checkpoints set it that a plain
one does not stand for: rotary embeddings scaled beyond the length they were trained with, windows shorter than the
context, soft-capped scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from support import families_variants
from support.families_sizes import (
    CONTEXT,
    KINDS,
    LAYERS,
    OVERRIDES,
    PROMPT_IDS,
    SIZES,
    SPECIAL,
    TRAINED,
    WINDOW,
    WINDOWS,
)


def names() -> list[str]:
    """Returns the model types that ``AutoModelForCausalLM`` takes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@cache
def entries() -> dict[str, dict[str, Any]]:
    """Returns the settings of all families and variants, by name; {} for a family that has no config of its own."""
    from huggingface_hub.errors import StrictDataclassError

    found: dict[str, dict[str, Any]] = {}
    for family in names():
        try:
            plain = _plain(family)
        except (ValueError, ImportError, StrictDataclassError):  # tiny() will tell
            found[family] = {}
            continue
        found[family] = plain
        for variant, settings in (*_window_variants(plain), *_decoder_variants(family)):
            found[f"{family}/{variant}"] = _merged(plain, settings)
        for variant, settings in families_variants.of(family):
            found[f"{family}/{variant}"] = _merged(plain, settings)
    return found


def tiny(name: str) -> Any:
    """Returns a tiny config of the family, or of the variant, that ``name`` names."""
    from transformers import AutoConfig

    family = name.split("/")[0]
    return AutoConfig.for_model(family, **(entries()[name] or _plain(family)))


def _defaults(family: str) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, Any] = CONFIG_MAPPING[family]().to_dict()
    return found


def _plain(family: str) -> dict[str, Any]:
    settings = _merged(_shrunk(_defaults(family)), OVERRIDES.get(family, {}))
    return settings if _kinds_of_window(settings) else _windows(settings, CONTEXT)


def _window_variants(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what a family whose layers have windows is without them, and the other way round."""
    if _kinds_of_window(plain):
        yield "short", _windows(plain, CONTEXT)
        return
    kinds = plain.get("layer_types") or []
    if not WINDOWS & plain.keys() or set(kinds) - {"full_attention"}:
        return
    more = {"use_sliding_window": True, "max_window_layers": 0} if "use_sliding_window" in plain else {}
    sliding = {"layer_types": ["sliding_attention"] * len(kinds)} if kinds else {}
    yield "window", _windows(plain, WINDOW) | sliding | more
    if more and kinds:
        layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
        yield "partial window", _windows(plain, WINDOW) | layers | more | {"max_window_layers": 2}


def _decoder_variants(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the decoder that a family of encoders, or of pairs, may be used as."""
    defaults = _defaults(family)
    if defaults.get("is_decoder") is False or defaults.get("is_encoder_decoder"):
        yield "decoder", {"is_decoder": True, "is_encoder_decoder": False}


def _kinds_of_window(settings: dict[str, Any]) -> bool:
    """Returns whether some kind of layer sees a part of the context only."""
    kinds = [kind for key in KINDS for kind in settings.get(key) or []]
    nested = any(_kinds_of_window(value) for value in settings.values() if isinstance(value, dict))
    return nested or any("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds)


def _windows(settings: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns the settings with all windows of one size."""
    return {
        key: _windows(value, size)
        if isinstance(value, dict)
        else size
        if key in WINDOWS and (value or size == WINDOW)
        else value
        for key, value in settings.items()
    }


def _shrunk(defaults: dict[str, Any], others: Any = None) -> dict[str, Any]:
    """Returns the settings that make the config with these defaults tiny."""
    others = count(PROMPT_IDS.stop) if others is None else others  # ids of images and sounds
    deep = next((defaults[key] for key in LAYERS if isinstance(defaults.get(key), int)), None)
    kinds = {key: list(dict.fromkeys(defaults[key])) for key in KINDS if isinstance(defaults.get(key), list)}
    layers = 4 if any(len(each) > 1 for each in kinds.values()) else 2
    found: dict[str, Any] = {}
    for key, value in defaults.items():
        token = re.fullmatch(r"(\w+)_token_(id|index)", key)
        if key in LAYERS and isinstance(value, int):
            found[key] = layers
        elif kinds.get(key):
            found[key] = (kinds[key] * layers)[:layers]
        elif isinstance(value, list) and len(value) == deep:
            found[key] = value[:layers]
        elif token is not None and value is not None:
            found[key] = SPECIAL[token[1]] if token[1] in SPECIAL else next(others)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(value, SIZES[key])
        elif key in WINDOWS or key == "use_sliding_window":
            found[key] = value
        elif isinstance(value, dict) and "model_type" in value:
            found[key] = {"model_type": value["model_type"], **_shrunk(value, others)}
        elif key == "rope_parameters" and isinstance(value, dict):
            found[key] = _nearer(value)
    if isinstance(defaults.get("kv_lora_rank"), int):  # latent attention: a key of its own for each head
        found["num_key_value_heads"] = found["num_attention_heads"]
    for key in ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"):
        if key in defaults and defaults[key] is None:
            found[key] = SIZES[key]
    return found


def _nearer(rotary: dict[str, Any]) -> dict[str, Any]:
    """Returns rotary settings whose length of training is one that a tiny context crosses."""
    nested = {key: _nearer(value) if isinstance(value, dict) else value for key, value in rotary.items()}
    return nested | (
        {"original_max_position_embeddings": TRAINED} if "original_max_position_embeddings" in nested else {}
    )


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def build(name: str, seed: int = 0, sharp: float = 3.0) -> Any:
    """Returns the float32 model of ``tiny(name)``, whose weights are large enough for all of it to matter.

    Args:
        sharp: scales queries and keys, in families that have projections of their own for them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny(name), dtype=torch.float32).eval()
    for spread in (0.7, 0.1, 0.02, 0.004):
        _draw(model, seed, sharp, spread)
        if not _copies(model):
            break
    return model


def _draw(model: Any, seed: int, sharp: float, spread: float) -> None:
    """Draws all weights; ``spread`` is the standard deviation of embeddings that are the output's weights too."""
    import torch

    torch.manual_seed(seed)
    head = model.get_output_embeddings()
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    for key, weight in model.named_parameters():
        if head is not None and weight.shape == head.weight.shape[:1] and key.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2 * spread)  # of the logits, which are as small
        elif weight.ndim <= 1:
            torch.nn.init.normal_(weight, mean=0.0 if key.endswith("bias") else 1.0, std=0.2)
        elif id(weight) in embeddings:
            torch.nn.init.normal_(weight, std=spread if head is not None and weight is head.weight else 0.7)
        else:
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
            if re.search(r"q_proj|k_proj|\.query|\.key|qkv|c_attn", key):
                weight.data *= sharp


def _copies(model: Any) -> bool:
    """Returns whether the model's next word tends to be the last: that would hide all that its layers do."""
    import torch

    ids = torch.randint(PROMPT_IDS.start, PROMPT_IDS.stop, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model(ids).logits.argmax(-1)
    return bool((found == ids).float().mean() > 0.1)


def save(name: str, directory: Path, seed: int = 0, sharp: float = 3.0) -> Path:
    """Writes the model of :func:`build` as a checkpoint, which has no tokenizer; returns the directory."""
    model = build(name, seed, sharp)
    model.save_pretrained(directory)
    if model.config.model_type != name.split("/")[0]:  # the text part of more: checkpoints have the config of it all
        tiny(name).save_pretrained(directory)
    return directory
