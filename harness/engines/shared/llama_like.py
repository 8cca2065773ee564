"""Which models have the decoder of a Llama, as our own passes compute it; told from a config alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from harness.engines.known_model import KnownModel
from harness.models.architecture import not_plain, rotary_settings, rotary_types

# The others' frequencies change with the length of the sequence (dynamic, longrope).
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Computed:
    """What one of the passes computes.

    Attributes:
        families: by ``model_type``.
        activations: of the gate, by ``hidden_act``.
    """

    families: tuple[str, ...]
    activations: tuple[str, ...] = ("silu",)


def unlike(known: KnownModel, computed: Computed) -> str | None:
    """Returns, in one clause, why a pass that computes so much does not compute a model; None when it does."""
    architecture = known.architecture
    if not architecture:
        return "its config is not known before it is downloaded"
    family = architecture.get("model_type")
    if family not in computed.families:
        return f"{family} is not one of the families that they compute ({', '.join(computed.families)})"
    # Made-up weights are drawn without the checkpoint's code.
    remote_code = known.remote_code and not known.dummy
    reason = not_plain(architecture, dummy=known.dummy, remote_code=remote_code)
    if reason is not None:
        return reason
    for rope_type in sorted(rotary_types(architecture) - set(ROPE_TYPES)):
        return f"its rotary embedding is scaled ({rope_type}; {', '.join(ROPE_TYPES)} are possible)"
    if any(
        (entry.get("partial_rotary_factor") or 1.0) != 1.0 for entry in (architecture, *rotary_settings(architecture))
    ):
        return "only a part of each head is rotated (partial_rotary_factor)"
    # One of a config that names none is its family's, and computed.
    if (activation := architecture.get("hidden_act")) not in (None, *computed.activations):
        return f"its hidden_act is {activation}, not {' or '.join(computed.activations)}"
    if architecture.get("mlp_bias"):
        return "it has mlp_bias"
    if architecture.get("use_bidirectional_attention"):
        return "its tokens see those after them (use_bidirectional_attention)"
    return None
