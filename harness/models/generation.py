"""Greedy decoding: when a request ends, and Hugging Face's settings for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.config.schema import GenerationConfig, Stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def stop_ids(model: PreTrainedModel, generation: GenerationConfig) -> frozenset[int]:
    """Returns the token ids that end a sequence: the checkpoint's own, or none under ``stop: length``."""
    if generation.stop is Stop.length:
        return frozenset()
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def stopping_criteria(generation: GenerationConfig, tokenizer: Any) -> list[Any] | None:
    """Returns what ``generate`` makes of ``stop_strings`` and ``tokenizer``, made once; None without stop strings."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    if not generation.stop_strings:
        return None
    return StoppingCriteriaList([StopStringCriteria(tokenizer, list(generation.stop_strings))])


def greedy(
    model: Any, input_ids: torch.Tensor, output_len: int, stop_ids: frozenset[int], **options: Any
) -> torch.Tensor:
    """Returns what Hugging Face's ``generate`` makes of a prompt, greedily.

    Args:
        model: loses its own generation config, from which ``generate`` would fill what ours leaves open: penalties,
            and an end of sequence under ``stop=length``. :func:`stop_ids` reads it, and comes first.
        input_ids: ``[1, tokens]``, on the model's device.
        output_len: ids to generate at most.
        stop_ids: that end it.
        options: of ``generate``, such as a ``streamer``, or :func:`stopping_criteria`.

    Returns:
        Prompt and output ids, ``[tokens]``, on the model's device.
    """
    import torch
    from transformers import GenerationConfig as Generation

    model.generation_config = Generation()
    config = Generation(
        do_sample=False,
        num_beams=1,
        max_new_tokens=output_len,
        use_cache=True,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **options
        )
    ids: torch.Tensor = output[0]
    return ids
