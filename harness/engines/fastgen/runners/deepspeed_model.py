"""DeepSpeed's models, policies and engine, with what :mod:`.deepspeed_runner` says is done differently."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.model_implementations import Llama2Policy, MistralPolicy, Phi3Policy, Qwen2Policy
from deepspeed.inference.v2.model_implementations.llama_v2.model import Llama2InferenceModel
from deepspeed.inference.v2.model_implementations.mistral.model import MistralInferenceModel
from deepspeed.inference.v2.model_implementations.phi3.model import Phi3InferenceModel
from deepspeed.inference.v2.model_implementations.qwen_v2.model import Qwen2InferenceModel
from deepspeed.inference.v2.modules.configs import RotateHalfConfig
from deepspeed.ops.op_builder import RaggedOpsBuilder
from torch import Tensor

from harness.engines.fastgen.runners.deepspeed_weights import Weights

CLASSES = {
    "llama": (Llama2Policy, Llama2InferenceModel),
    "mistral": (MistralPolicy, MistralInferenceModel),
    "qwen2": (Qwen2Policy, Qwen2InferenceModel),
    "phi3": (Phi3Policy, Phi3InferenceModel),
}


class Engine(InferenceEngineV2):
    """DeepSpeed's engine in a process group that is there already."""

    def __init__(self, policy: Any, config: RaggedInferenceEngineConfig, group: Any) -> None:
        self._group = group
        super().__init__(policy, config)

    def _initialize_tp_group(self) -> Any:
        return self._group


class _Policy:
    """Mixed into DeepSpeed's policies: builds the model once, leaves the weights where they are."""

    model: Any = None
    model_class: Any
    build_container_map: Any
    _model_config: Any
    _checkpoint_engine: Weights

    def build_model(self, engine_config: RaggedInferenceEngineConfig, mp_group: Any) -> Any:
        """Returns the model with its weights; the engine asks again for the one that ``load`` has built."""
        if self.model is None:
            self.model = self.model_class(self._model_config, engine_config, mp_group)
            self.populate_model_parameters()
        return self.model

    def populate_model_parameters(self) -> None:
        """Hands each weight to its container, which shards it; nothing is copied into one buffer."""
        parameters = self.build_container_map()
        for name, parameter in self._checkpoint_engine.parameters():
            parameters.map_param(name, parameter)
        device = get_accelerator().current_device()
        layers, others = parameters.transformer_params, parameters.non_transformer_params
        for container in (*layers, others):
            for name in container.annotation_attrs:
                setattr(container, name, getattr(container, name).to(device))  # packed weights come from the host
        parameters.validate()
        self.model.set_parameters(layers, others, flattened_param_buffer=None, flattened_param_metadata=None)


class _Model:
    """Mixed into DeepSpeed's models; see the module's docstring for the reasons."""

    norm: Any
    unembed: Any
    attn: Any
    frequencies: Tensor
    _config: Any
    _engine_config: RaggedInferenceEngineConfig
    _base_mp_group: Any

    def __init__(self, config: Any, engine_config: RaggedInferenceEngineConfig, base_mp_group: Any) -> None:
        super().__init__(config, engine_config, base_mp_group)  # type: ignore[call-arg]
        for kernel in (self.norm._fp_rms, self.norm._fp_rms_pre, self.unembed._norm):
            kernel.epsilon = config.rms_norm_eps
        self.attn._kv_copy = _Rotary(self.attn._kv_copy, self.frequencies)

    @property
    def tp_size(self) -> int:
        """Ranks that share the model; known without a process group."""
        return int(self._engine_config.tensor_parallel.tp_size)

    @property
    def tp_rank(self) -> int:
        """This process among them."""
        return 0 if self.tp_size == 1 else torch.distributed.get_rank(self._base_mp_group)

    @property
    def activation_dtype(self) -> DtypeEnum:
        """The run's own."""
        return DtypeEnum(self._config.dtype)

    @property
    def positional_embedding_config(self) -> RotateHalfConfig:
        """Its base is not used."""
        return RotateHalfConfig()


class _Rotary:
    """DeepSpeed's rotary embedding and copy into the KV cache, with exact frequencies.

    Args:
        rotary: the module's own, which has checked sizes and type.
        frequencies: float32 ``[head_dim / 2]``, on the device.
    """

    def __init__(self, rotary: Any, frequencies: Tensor) -> None:
        self.widths = [rotary.head_size * heads for heads in (rotary.n_q_heads, rotary.n_kv_heads, rotary.n_kv_heads)]
        self.frequencies = frequencies
        self.kernel = RaggedOpsBuilder().load().kv_trained_rotary_embeddings

    def __call__(self, kv_cache: Tensor, qkv: Tensor, batch: Any) -> None:
        """Rotates queries in place, writes keys, rotated, and values into ``kv_cache``; ``qkv`` is a row a token."""
        query, key, value = qkv.split(self.widths, dim=1)
        self.kernel(
            kv_cache,
            query,
            key,
            value,
            self.frequencies,
            batch.batch_metadata_buffer(),
            batch.inflight_seq_descriptors(),
            batch.tokens_to_seq(),
            batch.kv_ptrs(),
        )


def policy_of(weights: Weights, frequencies: Tensor) -> Any:
    """Returns DeepSpeed's policy for the weights' family, it and its model with the changes above."""
    config = weights.model.config
    policy, model = CLASSES[config.model_type]
    model_class = type(f"Harness{model.__name__}", (_Model, model), {"frequencies": frequencies})
    policy_class = type(f"Harness{policy.__name__}", (_Policy, policy), {"model_class": model_class})
    return policy_class(config, checkpoint_engine=weights)
