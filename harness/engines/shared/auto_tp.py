"""A Hugging Face model under ``deepspeed.init_inference``: sharded by AutoTP, or with injected kernels."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch

from harness.basics.errors import UserError, one_line
from harness.engines.base import EngineSettings
from harness.engines.shared.attention_checks import BASELINE
from harness.models import loading
from harness.ranks.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class _Unit:
    """What DeepSpeed calls an mpu: without one its tensor-parallel group is always the first ranks of the launch."""

    tensor: TensorParallel

    def get_model_parallel_group(self) -> Any:
        return self.tensor.group

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size


def load_whole(settings: EngineSettings, attention: str | None) -> Any:
    """Returns the model on the device; under tensor parallelism on the host, for the whole may not fit a device.

    Args:
        attention: a name that transformers' ``attn_implementation`` takes; None for its own choice.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        return loading.load_model(
            settings.source,
            dtype=getattr(torch, settings.dtype),
            attention=attention,
            device=settings.device if settings.tensor is None else "cpu",
        )
    except UserError as error:
        if attention is None or not (isinstance(error.__cause__, KeyError) and error.__cause__.args == (attention,)):
            raise
        family, engine = settings.source.architecture.get("model_type"), settings.engine.name
        why = f"{family} models cannot be computed by engine={engine}: they have a choice of attentions of their own"
        raise UserError("model", why, BASELINE) from error


def init_inference(model: Any, settings: EngineSettings, **options: Any) -> Any:
    """Returns DeepSpeed's ``InferenceEngine`` around ``model``, on the settings' device.

    Args:
        options: more of ``deepspeed.init_inference``'s config, such as ``replace_with_kernel_inject``.

    Raises:
        UserError: DeepSpeed cannot shard this model.
    """
    import deepspeed

    tensor = settings.tensor
    config: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), **options}
    if tensor is not None:
        # Widths in steps that matrix kernels like, fine enough for even shards: 11,008 over 8 ranks is 1,376 each.
        config["tensor_parallel"] = {
            "tp_size": tensor.size,
            "tp_grain_size": 16,
            "tp_group": tensor.group,
            "mpu": _Unit(tensor),
        }
    exact = {name: buffer for name, buffer in model.named_buffers() if buffer.dtype is torch.float32}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its policy
            engine = deepspeed.init_inference(model, config=config)
    except (AssertionError, ValueError, NotImplementedError) as error:
        field = "parallel.tp" if tensor is not None else "engine.kernel_inject"
        raise UserError(
            field, f"DeepSpeed cannot take this model: {one_line(str(error), 200)}", "use parallel=single"
        ) from error
    _keep_exact(engine.module, exact)
    return engine


def _keep_exact(model: Any, buffers: dict[str, torch.Tensor]) -> None:
    """Puts back the float32 buffers, which DeepSpeed has made 16 bits wide: rotary frequencies among them.

    Rounded to bfloat16 they turn a head by 0.09 rad too much or too little at position 500 already. What hangs on a
    rotary embedding beside its buffers (``original_inv_freq``, ``long_inv_freq``) is not converted.
    """
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:  # a layer that was replaced as a whole
            continue
        if (rounded := module._buffers.get(key)) is not None:
            module._buffers[key] = buffer.to(rounded.device)
