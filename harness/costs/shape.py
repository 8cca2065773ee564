"""The sizes of a model that its memory, its arithmetic and its time follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.models.architecture import COUNTED, attention_heads, parameters

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes, in elements, and how many bytes its elements take.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocab, inner: as in the checkpoint's config; ``inner`` is the MLP's.
        matmul: elements of the layers' matrices; each token is multiplied with all of them, 2 FLOPs an element.
        head: elements of the output projection, vocabulary times hidden.
        total: elements of the checkpoint; tied embeddings count once.
        element_bytes: of an activation and of a weight outside the layers' matrices.
        weight_bytes: of an element of the layers' matrices: 0.5 for 4 bits, without the scales of their groups.
        kv_element_bytes: of an element of the KV cache.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    inner: int
    matmul: int
    head: int
    total: int
    element_bytes: float
    weight_bytes: float
    kv_element_bytes: float

    @classmethod
    def of(
        cls,
        architecture: dict[str, Any],
        dtype: str,
        weight_bits: float | None = None,
        kv_bits: float | None = None,
    ) -> ModelShape:
        """Returns the shape of a model.

        Args:
            architecture: the keys of the checkpoint's ``config.json``.
            dtype: torch type of weights and activations.
            weight_bits: of an element of the layers' matrices, where it is not that of the type.
            kv_bits: of an element of the KV cache, likewise.

        Raises:
            UserError: the sizes are not known.
        """
        count = parameters(architecture)
        if count is None:
            found = f"the sizes of model_type {quoted(architecture.get('model_type'))} are not known"
            remedy = f"give a checkpoint or model.architecture of one of {', '.join(COUNTED)}"
            raise UserError("model", found, remedy)
        heads, kv_heads, head_dim = attention_heads(architecture)
        element = ELEMENT_BYTES[dtype]
        return cls(
            layers=architecture["num_hidden_layers"],
            hidden=architecture["hidden_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=architecture["vocab_size"],
            inner=architecture["intermediate_size"],
            matmul=count.matmul,
            head=count.head,
            total=count.total,
            element_bytes=element,
            weight_bytes=element if weight_bits is None else weight_bits / 8,
            kv_element_bytes=element if kv_bits is None else kv_bits / 8,
        )

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_element_bytes

    @property
    def matrix_bytes(self) -> float:
        """Bytes of the layers' matrices."""
        return self.matmul * self.weight_bytes

    @property
    def head_bytes(self) -> float:
        """Bytes of the output projection, none where it is the embedding: what ranks that share a model split too."""
        tied = self.total - self.matmul < 2 * self.head
        return 0.0 if tied else self.head * self.element_bytes

    @property
    def other_bytes(self) -> float:
        """Bytes of what is never packed: embeddings, output projection, norms, biases."""
        return (self.total - self.matmul) * self.element_bytes
