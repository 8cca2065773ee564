"""Loads a model's weights: a checkpoint's, read by transformers, or random ones (dummy). Only a rank does so."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from harness.basics.errors import UserError, quoted
from harness.models.architecture import LLAMA_LIKE, first_layers
from harness.models.directory import refuse_kernels
from harness.models.source import Source
from harness.models.transformers_config import dummy_config, refuse_encoders, take_special_ids
from harness.models.transformers_quiet import as_user_error, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    device: str = "cpu",
    device_map: Any = None,
    seed: int = 0,
    layers: int | None = None,
) -> PreTrainedModel:
    """Returns the model, ready for inference: eval mode, no gradients.

    Args:
        source: from `locate.locate`.
        dtype: type of the weights.
        attention: a name that transformers' ``attn_implementation`` takes; None for its own choice.
        device: where the weights go, if ``device_map`` is None.
        device_map: accelerate's, e.g. ``"auto"`` for a model larger than one device.
        seed: of dummy weights; the same seed gives the same weights, of :data:`LLAMA_LIKE` families on any device.
        layers: load the first so many alone, of a checkpoint.

    Raises:
        UserError: transformers cannot read the checkpoint, or its weights do not fit its config.
    """
    if device_map is None and device != "cpu":
        device_map = {"": device}
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "device_map": device_map}
    model = _load_dummy(source, seed, kwargs) if source.kind == "dummy" else _load_pretrained(source, kwargs, layers)
    model.requires_grad_(False)
    return model.eval()


def _load_pretrained(source: Source, kwargs: dict[str, Any], layers: int | None) -> PreTrainedModel:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    hub = source.kind == "hub"
    kwargs |= {
        "local_files_only": not hub,
        "use_safetensors": None if source.pickled else True,
        "weights_only": True,  # out of a pickle, tensors alone
        "trust_remote_code": source.trust_remote_code,
    }
    if source.gguf_file is not None:
        kwargs["gguf_file"] = source.gguf_file
        try:
            from transformers.utils.quantization_config import GgufConfig

            kwargs["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass  # transformers before GgufConfig always dequantizes
    where = os.path.join(str(source.path), source.gguf_file or "")
    gguf = source.gguf_file is not None
    with quiet(downloads=hub, stderr=not gguf), as_user_error("model.path", where.rstrip(os.sep)):
        if hub:  # whose config nobody has read yet
            raw, _ = transformers.PretrainedConfig.get_config_dict(source.path)
            refuse_kernels(raw, f"model.path, {source.path}, ", source.trust_remote_code)
        if layers is not None:
            kwargs["config"] = _first_layers(source, layers)
        # Mismatches are let through here because the report below names them better than an exception.
        model, info = auto.from_pretrained(
            source.path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    refuse_encoders(model.config)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    # Older LLaMA checkpoints also hold each layer's rotary frequencies, which follow from the config.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]
    if layers is not None:
        unexpected = [key for key in unexpected if _layer_of(key) < layers]
    refuse_other_weights(source, info["missing_keys"], mismatched, unexpected)
    if source.kind == "gguf":  # the weights are plain now, and must look so to whoever saves or shards them
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model


def _first_layers(source: Source, layers: int) -> Any:
    """Returns the checkpoint's config with so many layers."""
    from transformers import AutoConfig

    extra = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code, **extra)
    text = config.get_text_config(decoder=True)
    for key, value in first_layers(text.to_dict(), layers).items():
        setattr(text, key, value)
    return config


def _layer_of(key: str) -> int:
    """Returns the number of the layer that a weight belongs to; -1 for one of the rest."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", key)
    return int(found[1]) if found else -1


def refuse_other_weights(
    source: Source, missing: Collection[str], mismatched: Collection[str], unexpected: Collection[str]
) -> None:
    """Raises UserError for a checkpoint whose weights are not those that its config describes."""
    for names, what in (
        (missing, "lacks weights"),
        (mismatched, "has weights of another shape than its config says"),
        (unexpected, "has weights that its config has no place for"),
    ):
        if names:
            found = f"{source.path} {what}: {len(names)}, for example {min(names)}"
            raise UserError("model.path", found, "use a complete checkpoint with its own config.json")


def _load_dummy(source: Source, seed: int, kwargs: dict[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from harness.models import made_up

    architecture = source.architecture
    with quiet(), as_user_error("model.architecture", quoted(architecture.get("model_type"))):
        config = dummy_config(source)
        config.initializer_range = made_up.DEVIATION
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        # Loading "nothing" allocates each weight once, on its own device, and has transformers initialise
        # weights, tied embeddings and rotary buffers as it does for a checkpoint that lacks them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(skeleton).from_pretrained(None, config=config, state_dict={}, **kwargs)
    if config.model_type in LLAMA_LIKE:  # whose weights a rank may draw in parts
        for name, weight in model.named_parameters():
            made_up.draw(name, weight.data, tuple(weight.shape), seed=seed)
    take_special_ids(model, architecture)
    return model
