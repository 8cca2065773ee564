"""What a model's ``config.json`` says: sizes, parameters, bytes, rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from harness.basics.errors import UserError, quoted
from harness.models.source import GIVE_PATH

# Where a family's config says how long a sequence may be; some keep it in the part of a larger model that reads text.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
COUNTED = (*LLAMA_LIKE, "gemma", "granite", "olmo2", "phi3")  # whose sizes follow from the config as llama's do
BIASED = ("llama", "qwen3", "gemma", "granite", "olmo2")  # with attention_bias, of the output projection too
TIED = ("gemma",)  # embeddings are tied unless the config says no
HEAD_DIM = {"qwen3": 128, "gemma": 256}  # what transformers takes where the config has no head_dim
ESSENTIAL = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Weights of a model, in elements."""

    total: int  # what the checkpoint holds; tied embeddings count once
    matmul: int  # multiplied once per token in the layers: q, k, v, o, gate, up, down
    head: int  # the output projection: vocabulary * hidden


def sizes(architecture: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes that tell one model of a family from another, without those that are not stated."""
    stated = {key: architecture.get(key) for key in SIZES}
    stated["num_key_value_heads"] = stated["num_key_value_heads"] or stated["num_attention_heads"]
    return {key: value for key, value in stated.items() if value is not None}


def first_layers(architecture: dict[str, Any], layers: int) -> dict[str, Any]:
    """Returns the keys, with their values, that make of an architecture that of its first ``layers`` alone."""
    cut: dict[str, Any] = {"num_hidden_layers": layers}
    if kinds := architecture.get("layer_types"):
        cut["layer_types"] = list(kinds)[:layers]
    return cut


def context_length(architecture: dict[str, Any], max_context: int | None) -> int | None:
    """Returns the longest sequence in tokens, prompt and output together; None where the model does not say.

    Raises:
        UserError: ``max_context`` is not positive or more than the model was built for.
    """
    parts = [architecture, architecture.get("text_config"), architecture.get("decoder")]
    stated = [positive_integer(part.get(key)) for part in parts if isinstance(part, dict) for key in POSITIONS]
    limit = next((positions for positions in stated if positions), None)
    if max_context is None:
        return limit
    if max_context < 1:
        raise UserError("model.max_context", f"{max_context} is not positive", "give a number of tokens, or null")
    if limit is not None and max_context > limit:
        raise UserError("model.max_context", f"{max_context} is more than the model's {limit} positions", "lower it")
    return max_context


def parameters(architecture: dict[str, Any]) -> ParameterCount | None:
    """Counts the weights of a model of :data:`COUNTED`; None for another family or an incomplete architecture.

    As transformers builds them (``modeling_*.py``): phi3 keeps query, key and value in one matrix, and gate and up in
    one, which has as many elements.
    """
    family = architecture.get("model_type")
    if family not in COUNTED or not all(positive_integer(architecture.get(key)) for key in ESSENTIAL):
        return None
    hidden, inner, layers = (architecture[key] for key in ESSENTIAL[:3])
    heads, kv_heads, head_dim = attention_heads(architecture)
    matmul = layers * (2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * inner)
    vectors = 2 * hidden  # the two norms of a layer
    if family == "qwen2" or (family in BIASED and architecture.get("attention_bias")):
        vectors += (heads + 2 * kv_heads) * head_dim + (hidden if family != "qwen2" else 0)
    if family in ("llama", "granite") and architecture.get("mlp_bias"):
        vectors += 2 * inner + hidden
    if family == "qwen3":
        vectors += 2 * head_dim  # q_norm and k_norm
    if family == "olmo2":
        vectors += (heads + kv_heads) * head_dim  # the same, of all heads together
    head = architecture["vocab_size"] * hidden
    embeddings = head if architecture.get("tie_word_embeddings", family in TIED) else 2 * head
    return ParameterCount(matmul + layers * vectors + hidden + embeddings, matmul, head)


def kv_bytes_per_token(architecture: dict[str, Any], bytes_per_element: int) -> int:
    """Returns the bytes that one token's keys and values take in all layers.

    Raises:
        UserError: the architecture lacks the sizes (a hub id that is not cached, or an unusual model).
    """
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not positive_integer(architecture.get(key)):
            raise UserError("model.path", f"the checkpoint's {key} is not known", GIVE_PATH)
    _, kv_heads, head_dim = attention_heads(architecture)
    return int(2 * architecture["num_hidden_layers"] * kv_heads * head_dim * bytes_per_element)


def required_bytes(architecture: dict[str, Any], bytes_per_element: int) -> int | None:
    """Returns the bytes that the weights alone take; None where `parameters` cannot count them."""
    count = parameters(architecture)
    return None if count is None else count.total * bytes_per_element


def check_architecture(architecture: dict[str, Any], where: str) -> None:
    """Checks the sizes which transformers, if they were missing, would replace by its defaults.

    Raises:
        UserError: a size is missing or cannot be; ``where`` is what the message puts before the key.
    """
    family = architecture.get("model_type")
    if not isinstance(family, str) or not family:
        raise UserError(f"{where}model_type", f"is {quoted(family)}", 'give the family of models, e.g. "llama"')
    if family not in COUNTED:
        return  # other families have other keys: transformers will tell
    for key in ESSENTIAL:
        if not positive_integer(architecture.get(key)):
            raise UserError(f"{where}{key}", f"is {quoted(architecture.get(key))}", "give a positive integer")
    for key in ("num_key_value_heads", "head_dim"):
        if architecture.get(key) is not None and not positive_integer(architecture[key]):
            found = f"is {quoted(architecture[key])}"
            raise UserError(f"{where}{key}", found, "give a positive integer or leave it out")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(architecture.get(key), dict | None):
            raise UserError(
                f"{where}{key}", f"is {quoted(architecture[key])}", "give rope_type and rope_theta, or null"
            )
    bounds = [("rms_norm_eps", architecture.get("rms_norm_eps"), 1.0)]
    bounds += [
        ("rope_theta", each.get("rope_theta"), math.inf) for each in (architecture, *rotary_settings(architecture))
    ]
    for key, value, bound in bounds:
        if value is not None and not (_is_number(value) and 0 < value < bound):
            raise UserError(f"{where}{key}", f"is {quoted(value)}", f"give a number above 0 and below {bound:g}")
    heads, kv_heads, head_dim = attention_heads(architecture)
    if heads % kv_heads:
        raise UserError(f"{where}num_key_value_heads", f"{kv_heads} does not divide the {heads} heads", "change one")
    if architecture.get("head_dim") is None and architecture["hidden_size"] % heads:
        found = f"{architecture['hidden_size']} is not a multiple of the {heads} heads"
        raise UserError(f"{where}hidden_size", found, "change one")
    if head_dim % 2:
        raise UserError(f"{where}head_dim", f"{head_dim} is odd, and rotary embeddings turn pairs", "make it even")


def attention_heads(architecture: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the query heads, the key-value heads and the size of one head."""
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim")
    if head_dim is None:
        head_dim = HEAD_DIM.get(str(architecture.get("model_type")), architecture["hidden_size"] // heads)
    return heads, architecture.get("num_key_value_heads") or heads, head_dim


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive_integer(value: object) -> int:
    """Returns ``value`` if it is a positive integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def not_plain(architecture: dict[str, Any], *, dummy: bool, remote_code: bool) -> str | None:
    """Returns why kernels that know a family's decoder by heart cannot take this one; None when they can.

    Args:
        dummy: the weights are made up, so how the checkpoint packs its own does not matter.
        remote_code: the checkpoint's own code may run, if it has any (``model.trust_remote_code``).
    """
    if remote_code and "auto_map" in architecture:
        return "the checkpoint brings its own code (model.trust_remote_code)"
    if not dummy and architecture.get("quantization_config"):
        return "the checkpoint's weights are packed (quantization_config)"
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not positive_integer(architecture.get(key)):
            return f"its {key} is not known"
    return None


def rotary_settings(architecture: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rotary settings, in ``rope_parameters`` since transformers 5 and in ``rope_scaling`` before."""
    for key in ("rope_parameters", "rope_scaling"):
        found = architecture.get(key)
        if isinstance(found, dict):
            yield found
            yield from (value for value in found.values() if isinstance(value, dict))  # one a kind of layer


def rotary_types(architecture: dict[str, Any]) -> set[str]:
    """Returns the kinds of rotary embedding that the config names, such as ``llama3``."""
    found = {entry.get("rope_type", entry.get("type")) for entry in rotary_settings(architecture)}
    return {str(rope_type) for rope_type in found if rope_type is not None}


def rotary_threshold(architecture: dict[str, Any]) -> int | None:
    """Returns the longest sequence that is computed with the rotary frequencies of a short one; None for any length.

    Beyond it transformers chooses other frequencies for all that share a pass (``longrope``, ``dynamic``), so that one
    sequence's length changes its neighbours' tokens, and a prompt's split its own.
    """
    limits: list[Any] = []
    for entry in rotary_settings(architecture):
        kind = entry.get("rope_type", entry.get("type"))
        if kind in ("longrope", "su"):
            found = architecture.get("original_max_position_embeddings") or entry.get(
                "original_max_position_embeddings"
            )
            limits.append(found or architecture.get("max_position_embeddings"))
        elif kind == "dynamic":
            limits.append(architecture.get("max_position_embeddings"))
    return min((limit for limit in limits if positive_integer(limit)), default=None)
