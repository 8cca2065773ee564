"""transformers' configs of models: made for dummy weights, and refused where no text can be generated with them."""

from __future__ import annotations

from typing import Any

from harness.basics.errors import UserError, quoted
from harness.models.source import Source

# A checkpoint's own code and packed weights: where the weights are made up there are neither.
NOT_FOR_DUMMIES = ("auto_map", "quantization_config")


def dummy_config(source: Source) -> Any:
    """Returns transformers' config for weights that are made up.

    Raises:
        UserError: ``model.architecture`` has a key that its family does not know: transformers would keep it and
            ignore it, so that a misspelt size would give another model than the one that was asked for.
    """
    from transformers import AutoConfig

    architecture = {key: value for key, value in source.architecture.items() if key not in NOT_FOR_DUMMIES}
    config = AutoConfig.for_model(**architecture)
    if source.path is None:  # a checkpoint's config.json may well have notes of other programs in it
        known = {*type(config)().to_dict(), *type(config).attribute_map, "rope_theta", "rope_scaling", "torch_dtype"}
        known |= AutoConfig.for_model("llama").to_dict().keys()  # conf/model describes Llamas; another family ignores
        if unknown := sorted({key for key, value in architecture.items() if value is not None} - known):
            raise UserError(
                f"model.architecture.{unknown[0]}",
                f"{quoted(architecture[unknown[0]])}: {config.model_type} models have no such key",
                "correct it, or set it to null",
            )
    refuse_encoders(config)
    return config


def take_special_ids(model: Any, architecture: dict[str, Any]) -> None:
    """Gives a made-up model's generation config the ids that its architecture names."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := architecture.get(key)) is not None:
            setattr(model.generation_config, key, value)


def refuse_encoders(config: Any) -> None:
    """Raises UserError for a model whose tokens see those after them: it predicts no next one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    family = config.model_type
    both_ways = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if both_ways or getattr(config, "is_encoder_decoder", False):
        raise UserError("model", f"{quoted(family)} models are encoders, or have one", "use a decoder, such as a Llama")
