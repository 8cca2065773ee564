"""Whether a model's attention is the one that our kernels compute: every token sees all before it, and nothing else.

Some models say so in their config. The others are asked: one token goes through the model, and a :class:`Probe` in
place of the attention notes what each layer hands over. What the model makes of many tokens shows in its proof
(:mod:`harness.engines.proof.proof`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.basics.errors import UserError, one_line
from harness.engines.shared.attention_checks import BASELINE, refuse_unusual_attention
from harness.machine import memory

log = logging.getLogger("harness")

# What a layer may hand to its attention and we may do without: it does not change the result, or the plan has it.
IGNORED = ("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "logits_to_keep", "is_causal")


@dataclass(slots=True)
class Probe:
    """In a plan's place it only notes what each layer would store.

    Attributes:
        layers: ``layer_idx`` of each call.
        shapes: key-value heads of this rank and their size; a shard's are not the config's, and may differ by rank.
        extras: by name, what else was handed over.
    """

    layers: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)

    def note(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """Notes a layer's call, and returns zeros for its output."""
        self.layers.append(int(getattr(module, "layer_idx", -1)))  # type: ignore[arg-type]
        self.shapes.append((key.shape[1], key.shape[3]))
        self.extras |= {name: extra for name, extra in extras.items() if name not in IGNORED and _counts(extra)}
        if mask is not None:
            self.extras["attention_mask"] = "a bias of its own"
        if extras.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            self.extras["is_causal"] = False
        if value.shape != key.shape:
            self.extras["value heads"] = f"of {value.shape[3]}, keys of {key.shape[3]}"
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _counts(extra: Any) -> bool:
    return isinstance(extra, Tensor) or bool(extra)


@torch.inference_mode()
def probe(model: Any, keyword: str, device: Any, max_context: int | None, engine: str) -> list[tuple[int, int]]:
    """Returns the key-value heads of each layer and their size, by sending one token through the model.

    Args:
        keyword: under which the engine's attention gets its plan from the model's ``forward``.
        engine: name of the engine, for the message.

    Raises:
        UserError: a layer does not go through transformers' attention interface, or asks more of it than ours does.
    """
    config = model.config
    family = f"{config.model_type} models"
    found = Probe()
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with computed(engine, config.model_type):
        model(input_ids=token, position_ids=token, use_cache=False, **{keyword: found})
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or len(found.layers)
    if not found.layers or found.layers != list(range(layers)):
        found_in = f"{len(set(found.layers))} of their {layers} layers use transformers' attention interface"
        raise UserError("model", f"{family} cannot be computed by engine={engine}: {found_in}", BASELINE)
    # A window's way out is no way out where there is something else, so it comes last.
    window = found.extras.pop("sliding_window", None)
    for name, extra in found.extras.items():
        what = name if isinstance(extra, Tensor) else f"{name}={one_line(str(extra), 60)}"
        raise UserError("model", f"{family} have attention that engine={engine} does not compute ({what})", BASELINE)
    refuse_unusual_attention(config.get_text_config(decoder=True).to_dict(), max_context, engine)
    if window and not (max_context is not None and window >= max_context):
        what = f"sliding_window={window}"
        raise UserError("model", f"{family} have attention that engine={engine} does not compute ({what})", BASELINE)
    return found.shapes


@contextmanager
def computed(engine: str, family: str, sharded: bool = False) -> Iterator[None]:
    """Turns what a model raises that an engine cannot drive into a :class:`UserError`.

    Args:
        engine: its name.
        family: of the model, its ``model_type``.
        sharded: other ranks take part, whose end shows as an error here that says nothing of the model.
    """
    try:
        yield
    except (UserError, MemoryError, FloatingPointError):
        raise
    except Exception as error:
        if memory.out_of_memory(error) or (sharded and _of_the_network(error)):
            raise
        log.info("not computed by engine=%s", engine, exc_info=True)  # for run.log: it may be our own mistake
        why = one_line(f"{type(error).__name__}: {error}", 150)
        remedy = "use another model" if engine == "baseline" else "use parallel.tp=1" if sharded else BASELINE
        raise UserError("model", f"{family} models cannot be computed by engine={engine} ({why})", remedy) from error


def _of_the_network(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, ConnectionError | torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out")
    )
