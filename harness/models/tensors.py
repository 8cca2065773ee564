"""A checkpoint's tensors, read from safetensors one part at a time: host memory never holds more than one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.basics.errors import UserError, quoted
from harness.models import made_up
from harness.models.architecture import LLAMA_LIKE
from harness.models.directory import weight_files
from harness.models.loading import refuse_other_weights
from harness.models.source import Source
from harness.models.transformers_config import dummy_config, take_special_ids
from harness.models.transformers_quiet import as_user_error, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head.weight"  # what the plain families call it; tied ones may store it a second time


@dataclass(frozen=True, slots=True)
class Part:
    """A part of one of the checkpoint's tensors, and where it goes.

    Attributes:
        name: of the tensor.
        to: of the tensor's shape, except along ``dim``, where it may be shorter; any type, any device.
        dim, begin: where the part starts, along which dimension.
    """

    name: str
    to: Tensor
    dim: int = 0
    begin: int = 0


class Checkpoint:
    """A model of which nothing is loaded but what is asked for.

    Attributes:
        model: the Hugging Face model on the meta device: config, generation config, names and shapes.
        tied: whether the output projection is the embedding.
        shapes: of the tensors, by name; of tied ones without the head.

    Args:
        source: a directory, a hub id or dummy weights.

    Raises:
        UserError: the config cannot be read, or the weights are not those that it describes.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.model = skeleton(source)
        self.tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if self.tied:
            self.shapes.pop(HEAD, None)
        self.files = {} if source.kind == "dummy" else files(source, self.shapes, {HEAD} if self.tied else set())

    def fill(self, parts: Iterable[Part]) -> int:
        """Fills the parts, file by file; returns how many bytes of the files were read for them."""
        wanted: dict[str, list[Part]] = {}
        for part in parts:
            wanted.setdefault(part.name, []).append(part)
        if self.source.kind == "dummy":
            for part in (part for some in wanted.values() for part in some):
                made_up.draw(part.name, part.to, self.shapes[part.name], part.dim, part.begin)
            return 0
        holding = [path for path, names in self.files.items() if not wanted.keys().isdisjoint(names)]
        return sum(self._fill(path, wanted) for path in holding)

    def read(self, name: str, dtype: torch.dtype) -> None:
        """Gives a module of :attr:`model`, such as ``model.norm``, its weights, in ``dtype`` on the CPU."""
        parts = []
        for place, module in self.model.get_submodule(name).named_modules(prefix=name):
            for leaf, weight in module.named_parameters(recurse=False):
                made = torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
                setattr(module, leaf, made)
                parts.append(Part(f"{place}.{leaf}", made))
        self.fill(parts)

    def _fill(self, path: Path, wanted: dict[str, list[Part]]) -> int:
        from safetensors import safe_open

        read = 0
        with as_user_error("model.path", str(path)), safe_open(path, framework="pt") as file:
            for name in self.files[path]:
                for part in wanted.get(name, ()):
                    places = slice(part.begin, part.begin + part.to.shape[part.dim])
                    stored = file.get_slice(name)[(slice(None),) * part.dim + (places,)]
                    part.to.copy_(stored)
                    read += stored.numel() * stored.element_size()
        return read


def plain(source: Source) -> Checkpoint | None:
    """Returns a checkpoint that can be read weight by weight; None where transformers is needed to make sense of it.

    It can be where a plain family's weights have the names and shapes that the family's model has. What is wrong with
    another one is for transformers to say.
    """
    facts = source.architecture
    unusual = source.pickled or source.trust_remote_code or facts.get("quantization_config") is not None
    if source.kind not in ("directory", "dummy") or unusual or facts.get("model_type") not in LLAMA_LIKE:
        return None
    try:
        return Checkpoint(source)
    except UserError:
        return None


def files(source: Source, shapes: dict[str, tuple[int, ...]], needless: Collection[str] = ()) -> dict[Path, list[str]]:
    """Returns which tensors each file of a directory or hub id has, after comparing all headers with the config.

    Args:
        shapes: that the config describes, by name.
        needless: names that may be there and are not listed.

    Raises:
        UserError: there are no safetensors, or weights are missing, unexpected or of another shape.
    """
    from safetensors import safe_open

    directory = Path(str(source.path))
    with quiet(downloads=True), as_user_error("model.path", str(source.path)):
        if source.kind == "hub":
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(source.path), allow_patterns=["*.safetensors", "*.json"]))
        found: dict[str, tuple[int, ...]] = {}
        named: dict[Path, list[str]] = {}
        for path in weight_files(directory):
            with safe_open(path, framework="pt") as file:
                # Older LLaMA checkpoints also hold each layer's rotary frequencies, which follow from the config.
                names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
                named[path] = [name for name in names if name not in needless]
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in named[path]}
    if not named:
        raise UserError(
            "model.path",
            f"{source.path} holds neither model.safetensors nor its index",
            "convert the weights to safetensors (transformers' save_pretrained does)",
        )
    both = shapes.keys() & found.keys()
    refuse_other_weights(
        source,
        missing=shapes.keys() - found.keys(),
        mismatched={name for name in both if shapes[name] != found[name]},
        unexpected=found.keys() - shapes.keys(),
    )
    return named


def skeleton(source: Source) -> PreTrainedModel:
    """Returns the Hugging Face model without weights: its config, generation config, names and shapes.

    Raises:
        UserError: transformers cannot read the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if source.kind == "dummy":
        with quiet(), as_user_error("model.architecture", quoted(source.architecture.get("model_type"))):
            model = _on_meta(AutoModelForCausalLM, dummy_config(source))
            take_special_ids(model, source.architecture)
            return model
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
