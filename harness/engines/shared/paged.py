"""What the engines with passes of a token budget over a paged KV cache have in common: their settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from harness.basics.errors import UserError, quoted
from harness.config.checks import AUTO, check_counts, check_size, check_whole_or_auto, parse_bytes
from harness.config.schema import DType
from harness.engines.room import Share
from harness.engines.shared.kv_memory import is_fraction

QUANTIZATIONS = ("wf6af16",)  # what DeepSpeed's ragged engine has: FP6 weights, float16 activations
FP6_BYTES = 0.75


class Sized(Protocol):
    """The sizes that they share: numbers, or :data:`AUTO` until the job is prepared."""

    token_budget: Any
    max_sequences: Any
    kv_memory: int | float | str


class Paged(Sized, Protocol):
    """The keys that those which compute share."""

    name: str
    quantization: str | None


def check(engine: Sized) -> None:
    """Raises UserError for sizes that cannot be."""
    given = {"engine.token_budget": engine.token_budget, "engine.max_sequences": engine.max_sequences}
    check_whole_or_auto(given)
    numbers = {key: value for key, value in given.items() if value != AUTO}
    check_counts(numbers)
    if engine.kv_memory != AUTO:
        check_size("engine.kv_memory", engine.kv_memory)
    if len(numbers) == len(given) and engine.token_budget < engine.max_sequences:
        raise UserError(
            "engine.token_budget",
            f"{engine.token_budget} is below engine.max_sequences={engine.max_sequences}, "
            "and every running sequence needs one token of each pass",
            "raise the budget or lower max_sequences",
        )


def check_quantization(engine: Paged, dtype: DType, accelerator: str, has: bool) -> None:
    """Raises UserError for a quantization that there is not, or not here.

    Args:
        has: whether the kernels asked for may be DeepSpeed's ragged ones.
    """
    asked = engine.quantization
    if asked is None:
        return
    if asked not in QUANTIZATIONS:
        raise UserError("engine.quantization", quoted(asked), f"give null or {' or '.join(QUANTIZATIONS)}")
    if accelerator != "cuda" or not has:
        raise UserError(
            "engine.quantization",
            f"{asked}: only DeepSpeed's ragged kernels on CUDA have it, this is {engine.name} on {accelerator}",
            "use engine.quantization=null",
        )
    if dtype is not DType.float16:
        raise UserError(
            "model.dtype",
            f"{dtype.value}: engine.quantization={asked} computes with float16 activations",
            "use model.dtype=float16",
        )


def share(engine: Sized) -> Share:
    """Returns what ``engine.kv_memory`` and the quantization, where there is one, make of the memory.

    Sizes that are not known yet are left at what :class:`Share` has.
    """
    found = Share(
        weight_bytes=None if getattr(engine, "quantization", None) is None else FP6_BYTES,
        pass_tokens=None if engine.token_budget == AUTO else engine.token_budget,
        rows=1 if engine.max_sequences == AUTO else engine.max_sequences,
    )
    amount = parse_bytes(engine.kv_memory)
    return replace(found, part=amount) if is_fraction(engine.kv_memory) else replace(found, given=int(amount))
