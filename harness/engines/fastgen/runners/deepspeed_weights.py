"""A model's weights for DeepSpeed's policies, one tensor at a time, from any source that the harness knows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from deepspeed.inference.v2.checkpoint import CheckpointEngineBase
from torch import Tensor

from harness.models import loading, made_up
from harness.models.source import Source
from harness.models.tensors import HEAD, files, skeleton

EMBEDDING = "model.embed_tokens.weight"


class Weights(CheckpointEngineBase):
    """What a policy reads a checkpoint through.

    Host memory never holds more than one tensor of a directory, and none of dummy weights on a device; a GGUF file is
    dequantized as a whole. Pickles are never read.

    Attributes:
        model: the Hugging Face model on the meta device: config, generation config, names and shapes.

    Args:
        source: from `checkpoint.locate`.
        dtype: type in which the weights are handed out.
        device: where dummy weights are drawn.
        place: where the weights are handed out; ``device`` unless DeepSpeed works on them on the host first.

    Raises:
        UserError: the checkpoint cannot be read, or its weights do not fit its config.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device, place: torch.device) -> None:
        self.source, self.dtype, self.device, self.place = source, dtype, device, place
        self.state: dict[str, Tensor] = {}
        if source.kind == "gguf":
            self.model = loading.load_model(source, dtype=dtype)
            self.state = dict(self.model.state_dict())
            self.model.to("meta")  # the tensors stay, in `state` alone
        else:
            self.model = skeleton(source)
        self.tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        self.expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if self.tied:
            for names in (self.expected, self.state):
                names.pop(HEAD, None)
        stored = source.kind in ("directory", "hub")
        self.shards = files(source, self.expected, {HEAD} if self.tied else set()) if stored else {}

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each weight's name and value, placed and typed; a tied head follows its embedding."""
        for name, tensor in self._stored():
            placed = tensor.to(device=self.place, dtype=self.dtype)
            yield name, placed
            if self.tied and name == EMBEDDING:
                yield HEAD, placed

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        if self.source.kind == "dummy":
            for name, shape in self.expected.items():
                yield name, self._drawn(name, shape)
        elif self.source.kind == "gguf":
            for name in self.expected:
                yield name, self.state.pop(name)
        for path, names in self.shards.items():
            with safe_open(path, framework="pt") as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a made-up weight, the same on every rank: its seed is its name."""
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        return weight.normal_(0.0, made_up.DEVIATION, generator=generator)
