"""A model's weights for DeepSpeed's policies, one tensor at a time, from any source that the harness knows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.inference.v2.checkpoint import CheckpointEngineBase
from torch import Tensor

from harness.basics.errors import UserError, quoted
from harness.models import loading
from harness.models.directory import weight_files
from harness.models.source import Source
from harness.models.transformers_config import dummy_config
from harness.models.transformers_quiet import as_user_error, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DUMMY_DEVIATION = 0.02  # as checkpoint.load_model draws them


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
        self.shards = self._shards() if source.kind in ("directory", "hub") else {}

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
        return weight.normal_(0.0, DUMMY_DEVIATION, generator=generator)

    def _shards(self) -> dict[Path, list[str]]:
        """Returns the names to read from each file, after comparing all headers with the config."""
        from safetensors import safe_open

        directory = Path(str(self.source.path))
        with quiet(downloads=True), as_user_error("model.path", str(self.source.path)):
            if self.source.kind == "hub":
                from huggingface_hub import snapshot_download

                patterns = ["*.safetensors", "*.json"]
                directory = Path(snapshot_download(str(self.source.path), allow_patterns=patterns))
            found: dict[str, tuple[int, ...]] = {}
            shards: dict[Path, list[str]] = {}
            for path in weight_files(directory):
                with safe_open(path, framework="pt") as shard:
                    # Older LLaMA checkpoints also hold rotary frequencies, some tied ones the head a second time.
                    names = [name for name in shard.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
                    shards[path] = [name for name in names if not (self.tied and name == HEAD)]
                    found |= {name: tuple(shard.get_slice(name).get_shape()) for name in shards[path]}
        if not shards:
            raise UserError(
                "model.path",
                f"{self.source.path} holds neither model.safetensors nor its index",
                "convert the weights to safetensors (transformers' save_pretrained does)",
            )
        both = self.expected.keys() & found.keys()
        loading.refuse_other_weights(
            self.source,
            missing=self.expected.keys() - found.keys(),
            mismatched={name for name in both if self.expected[name] != found[name]},
            unexpected=found.keys() - self.expected.keys(),
        )
        return shards


def skeleton(source: Source) -> PreTrainedModel:
    """Returns the Hugging Face model without weights: its config, generation config, names and shapes.

    Raises:
        UserError: transformers cannot read the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if source.kind == "dummy":
        with quiet(), as_user_error("model.architecture", quoted(source.architecture.get("model_type"))):
            return _on_meta(AutoModelForCausalLM, dummy_config(source))
    local = source.kind != "hub"
    with quiet(downloads=not local), as_user_error("model.path", str(source.path)):
        config = AutoConfig.from_pretrained(source.path, local_files_only=local, trust_remote_code=False)
        model = _on_meta(AutoModelForCausalLM, config)
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.path, local_files_only=local)
        except OSError:
            pass  # it has none, and from_config made one from the config
    return model


def _on_meta(auto: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(config)
