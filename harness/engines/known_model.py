"""What is known of a model before its weights are loaded: all that decides which kernels can compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.models.source import Source


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model, its type, and how it is shared.

    Attributes:
        architecture: the keys of the checkpoint's ``config.json``; empty before it is downloaded.
        dtype: name of the torch type of weights and activations.
        tp: ranks that share it.
        max_context: longest prompt plus output in tokens; None is the model's own limit.
        dummy: the weights are made up, so how the checkpoint packs its own does not matter.
        remote_code: the checkpoint's own code may run, if it has any (``model.trust_remote_code``).
        pickled: the weights are no safetensors (``model.allow_pickle``).
        gguf: nor are these.
    """

    architecture: dict[str, Any]
    dtype: str
    tp: int = 1
    max_context: int | None = None
    dummy: bool = False
    remote_code: bool = False
    pickled: bool = False
    gguf: bool = False

    @classmethod
    def of(cls, source: Source, dtype: str, tp: int = 1, max_context: int | None = None) -> KnownModel:
        """Returns what is known of a checkpoint that has been located."""
        return cls(
            source.architecture,
            dtype,
            tp,
            max_context,
            dummy=source.kind == "dummy",
            remote_code=source.trust_remote_code,
            pickled=source.pickled,
            gguf=source.kind == "gguf",
        )
