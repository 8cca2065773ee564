"""Which models say in their config that their tokens do not simply see all tokens before them. Imports no torch."""

from __future__ import annotations

from typing import Any

from harness.basics.errors import UserError
from harness.models.architecture import rotary_threshold

BASELINE = "use engine=baseline"


def refuse_unusual_attention(config: dict[str, Any], max_context: int | None, engine: str) -> None:
    """Raises UserError for a model whose attention ``engine`` does not compute.

    Args:
        config: transformers' own, with all of a family's defaults.
    """
    refuse_by_its_file(config, max_context, engine)
    kinds = set(config.get("layer_types") or []) - {"full_attention"}
    window = config.get("sliding_window")
    windowed = kinds == {"sliding_attention"} or (not kinds and window and config.get("use_sliding_window", True))
    covered = window and max_context is not None and window >= max_context
    if not (windowed or kinds) or (windowed and covered):
        return
    raise UserError(
        "model",
        f"{config.get('model_type')} has attention that engine={engine} does not compute "
        f"(layer types {sorted(kinds) or ['full_attention']}, sliding window {window})",
        f"{BASELINE}{f', or model.max_context={window}' if windowed and window else ''}",
    )


def refuse_by_its_file(architecture: dict[str, Any], max_context: int | None, engine: str) -> None:
    """Does the same by what a ``config.json`` says itself: keys that it lacks have defaults that are not known here."""
    family = architecture.get("model_type")
    if cap := architecture.get("attn_logit_softcapping"):
        found = f"{family} has attention that engine={engine} does not compute (attn_logit_softcapping={cap})"
        raise UserError("model", found, BASELINE)
    threshold = rotary_threshold(architecture)
    if threshold is not None and (max_context is None or max_context > threshold):
        raise UserError(
            "model",
            f"{family} has rotary frequencies that depend on the longest sequence of a pass beyond {threshold} tokens",
            f"use model.max_context={threshold}, or engine=baseline",
        )
