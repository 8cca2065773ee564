"""Forward passes on DeepSpeed's ragged inference engine, ``InferenceEngineV2``: CUDA only.

DeepSpeed's models, sharding, KV cache and kernels do the work. What is done differently here, each for a reason
found in its source (0.19.8; paths start at ``deepspeed/inference/v2``):

* Rotary frequencies. The kernel that the models launch rounds them to float16 or bfloat16, and with grouped
  queries only those of the keys and of each group's first query (kernels/ragged_ops/linear_blocked_kv_rotary/
  blocked_kv_rotary_cuda.cu): at position 1000, in bfloat16 and heads of 128, a key and a query of the same token
  are turned by up to 1.2 radians against each other. The same kernel also takes frequencies in float32;
  ``deepspeed_model._Rotary`` gives it Hugging Face's.
* RMSNorm's epsilon. Only qwen_v2 takes it from the config, and not for the last norm; the others use 1e-5.
* Type of the activations. qwen_v2 is always float16, the others read an attribute that transformers 5 deprecates.
* Attention atoms. Their buffers hold ``max_ragged_sequence_count`` of them, and nothing checks it; a sequence takes
  one for every 64 or 128 of its tokens (kernels/ragged_ops/atom_builder). :func:`engine_config` makes room.
* Weights. DeepSpeed keeps all of them in host memory and then holds them twice on the device to lay them out in one
  buffer. Here each goes to the device as it is read, is sharded there, and stays where it is.
* Ranks. DeepSpeed's tensor-parallel group is the ranks from 0; here it is the one that ``EngineSettings`` brings.
* Passes. ``put`` and ``flush`` are not called: :mod:`.deepspeed_batch` writes the buffers, and the scheduler's blocks.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
from deepspeed.inference.v2.inference_utils import elem_size
from deepspeed.inference.v2.logging import inference_logger
from torch import Tensor

from harness.basics.errors import UserError
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners import deepspeed_model
from harness.engines.fastgen.runners.base import AtOnce
from harness.engines.fastgen.runners.deepspeed_batch import Passes
from harness.engines.fastgen.runners.deepspeed_weights import Weights
from harness.engines.known_model import KnownModel
from harness.engines.shared import deepspeed_ops
from harness.engines.shared.device_time import DeviceTime
from harness.engines.shared.kv_memory import kv_memory_bytes, too_little, too_much
from harness.engines.shared.ragged_kernels import FP6, TOKENS_MOST, attention_atoms, device_unsupported, unsupported
from harness.engines.shared.unusable import Unusable
from harness.machine.memory import available_memory_bytes
from harness.models.generation import stop_ids

INDEXABLE = 2**31  # elements of one layer's cache that the rotary kernel's int32 offsets reach


def engine_config(settings: EngineSettings) -> RaggedInferenceEngineConfig:
    """Returns DeepSpeed's settings for ours, with a KV cache of one block until it is known how large it can be.

    Raises:
        UserError: the token budget is more than the kernels take.
    """
    engine = settings.engine
    if engine.token_budget > TOKENS_MOST:
        found = f"{engine.token_budget} is more than deepspeed's kernels compute in one pass"
        raise UserError("engine.token_budget", found, f"use at most {TOKENS_MOST}, or engine.kernels=torch")
    atoms = attention_atoms(engine.token_budget, engine.max_sequences)
    context = {} if settings.max_context is None else {"max_context": settings.max_context}
    return RaggedInferenceEngineConfig(
        tensor_parallel={"tp_size": settings.tp},
        state_manager={
            "max_ragged_batch_size": engine.token_budget,
            "max_ragged_sequence_count": atoms,
            "max_tracked_sequences": atoms,
            "memory_config": {"mode": "allocate", "size": 1},
            **context,
        },
        quantization={"quantization_mode": engine.quantization},
    )


class DeepSpeedRunner(AtOnce):
    """DeepSpeed's model over DeepSpeed's cache, for the scheduler's passes.

    The weights are there after :meth:`load`, the KV cache after :meth:`allocate`, when it is known how much memory
    the weights and the engine's buffers have left.
    """

    name = "deepspeed"
    every_token = False

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.tensor = settings.tensor
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.device_time = DeviceTime(self.device)
        self.block_size = 0

    def load(self) -> None:
        """Loads this rank's share of the weights; compiles the kernels where that was never done.

        Raises:
            Unusable: they cannot be compiled here.
            UserError: the kernels cannot compute this model, or the device cannot run them.
        """
        inference_logger(level=logging.ERROR)  # its progress reports are not ours
        settings = self.settings
        self.engine_config = engine_config(settings)
        quantization = settings.engine.quantization
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where DeepSpeed puts all that it allocates
            _refuse(device_unsupported(quantization, torch.cuda.get_device_capability(self.device)[0]))
        self._build()
        # The kernels' own packing of FP6 weights runs on the host.
        place = torch.device("cpu") if quantization == FP6 else self.device
        weights = Weights(settings.source, self.dtype, self.device, place)
        config = weights.model.config
        known = KnownModel.of(settings.source, settings.dtype, settings.tp, settings.max_context)
        _refuse(unsupported(replace(known, architecture=config.to_dict()), quantization))
        config.dtype = self.dtype
        config.max_seq_length = settings.max_context or config.max_position_embeddings  # DeepSpeed's name for it
        self.stop = stop_ids(weights.model, settings.generation)
        rotary = type(weights.model.model.rotary_emb)(config)  # a second one: the model's is on the meta device
        self.policy = deepspeed_model.policy_of(weights, rotary.inv_freq.to(self.device, torch.float32))
        model = self.policy.build_model(self.engine_config, self._group)
        self.block_size = model.attn.kv_block_size

    def stop_ids(self) -> frozenset[int]:
        """Returns the checkpoint's end-of-sequence ids, none under ``generation.stop=length``."""
        return self.stop

    def allocate(self, max_blocks: int) -> int:
        """Makes the cache: ``engine.kv_memory`` worth of blocks, at most ``max_blocks``, as many on all ranks.

        Raises:
            UserError: the memory is not there, or does not hold one block.
        """
        (cache,) = self.policy.model.kv_cache_config()
        layers, kv_heads, head_dim = cache.cache_shape
        layer_elements = cache.block_size * 2 * kv_heads * head_dim
        block_bytes = layers * layer_elements * elem_size(cache.cache_dtype)
        setting, free = self.settings.engine.kv_memory, self._free_memory()
        asked = kv_memory_bytes(setting, free)
        blocks, possible = asked // block_bytes, free // block_bytes
        if self.tensor is not None:
            # All ranks must find the same, or some would refuse while the others wait for them.
            blocks, possible = self.tensor.least(blocks), self.tensor.least(possible)
        blocks = min(blocks, max_blocks, INDEXABLE // layer_elements)
        if blocks > possible:
            raise too_much(setting, asked, free)
        if blocks < 1:
            raise too_little(setting, asked, cache.block_size, block_bytes)
        self.engine_config.state_manager.memory_config.size = blocks
        self.engine = deepspeed_model.Engine(self.policy, self.engine_config, self._group)
        self.passes = Passes(self.engine, self.block_size)
        return int(blocks)

    @torch.no_grad()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """Returns the greedy token ids, int64 ``[rows]`` on the CPU, one for each ``last`` chunk."""
        if not batch.chunks:
            return torch.empty(0, dtype=torch.int64)
        return self._compute(batch).argmax(-1).cpu()[_last(batch)]

    @torch.no_grad()
    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Returns logits ``[rows, vocab]`` of the kernels' type, on the device, one row for each ``last`` chunk."""
        assert rows is None
        return self._compute(batch)[_last(batch)]

    def _compute(self, batch: RaggedBatch) -> Tensor:
        """Returns one row of logits for each chunk, those in the middle of a prompt too."""
        with self.device_time.passing():
            return self.passes.compute(batch)

    def free(self, sequence: Sequence) -> None:
        """Nothing to do: the blocks are the scheduler's, and their next holder overwrites them."""

    def _build(self) -> None:
        """Compiles what was never compiled; raises Unusable on all ranks of the model where one cannot."""
        reason = None
        try:
            deepspeed_ops.load(deepspeed_ops.RAGGED, self.settings.leads)
        except deepspeed_ops.OpsError as error:
            reason = f"its kernels cannot be built ({deepspeed_ops.AHEAD} shows more): {error}"
        if self.tensor is not None and self.tensor.least(reason is None) == 0:
            reason = reason or "another rank cannot build its kernels"
        if reason is not None:
            raise Unusable("deepspeed", reason)

    @property
    def _group(self) -> Any:
        return None if self.tensor is None else self.tensor.group

    def _free_memory(self) -> int:
        if self.device.type != "cuda":
            return available_memory_bytes()
        if self.tensor is not None:  # NCCL takes its buffers with the first reduction
            torch.distributed.all_reduce(torch.zeros(1, device=self.device), group=self.tensor.group)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def _last(batch: RaggedBatch) -> list[int]:
    """Returns which of the pass's chunks are ``last`` ones."""
    return [number for number, (*_, last) in enumerate(batch.chunks) if last]


def _refuse(reason: str | None) -> None:
    if reason is not None:
        found = f"deepspeed's kernels cannot run this model: {reason}"
        raise UserError("engine.kernels", found, "use engine.kernels=torch")
