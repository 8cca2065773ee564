"""Forward passes on PyTorch: CPU, and any device without DeepSpeed's ragged kernels.

The model is the Hugging Face decoder itself, with its attention replaced through transformers' attention
interface, so that every Llama-like model works and DeepSpeed's AutoTP can shard it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import AtOnce
from harness.engines.fastgen.runners.paged_attention import KvCache, build_plan, ragged_attention
from harness.engines.shared import auto_tp
from harness.engines.shared.device_time import DeviceTime
from harness.engines.shared.kv_memory import affordable_blocks, free_memory
from harness.engines.shared.packed_linear import can_pack, pack_linears
from harness.engines.shared.plain_attention import probe
from harness.models.architecture import LLAMA_LIKE
from harness.models.generation import stop_ids

ATTENTION = "harness_ragged"


class TorchRunner(AtOnce):
    """One ragged forward a pass through a Hugging Face model."""

    name = "torch"
    every_token = True

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.device_time = DeviceTime(self.device)
        self.block_size = settings.engine.kv_block_size
        self.caches: list[KvCache] = []
        self.kv_shapes: list[tuple[int, int]] = []  # key-value heads of this rank and their size, for each layer

    def load(self) -> None:
        """Loads the weights; raises UserError for a model whose attention is not plain causal."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, ragged_attention)
        self.model = auto_tp.load_whole(self.settings, ATTENTION)
        if self.settings.tensor is not None:
            self.model = auto_tp.init_inference(self.model, self.settings).module
        self.kv_shapes = probe(self.model, "ragged", self.device, self.settings.max_context, "fastgen")
        if can_pack(self.device, self.dtype):
            pack_linears(self.model)

    def stop_ids(self) -> frozenset[int]:
        """Returns the checkpoint's end-of-sequence ids, none under ``generation.stop=length``."""
        return stop_ids(self.model, self.settings.generation)

    def allocate(self, max_blocks: int) -> int:
        """Makes the cache: ``engine.kv_memory`` worth of blocks, at most ``max_blocks``."""
        shapes = self.kv_shapes  # of this rank's shard
        block_size = self.block_size
        block_bytes = 2 * block_size * self.dtype.itemsize * sum(heads * head_dim for heads, head_dim in shapes)
        setting, free = self.settings.engine.kv_memory, free_memory(self.settings)
        blocks = affordable_blocks(setting, free, max_blocks, block_size, block_bytes)
        self.caches = [
            KvCache(*(self._zeros(blocks, heads, block_size, head_dim) for _ in range(2))) for heads, head_dim in shapes
        ]
        return blocks

    @contextmanager
    def warming(self) -> Iterator[None]:
        """See :meth:`Runner.warming`: on a CPU two layers do where all are alike, and use the same memory."""
        if self.device.type != "cpu" or self.model.config.model_type not in LLAMA_LIKE:
            yield
            return
        decoder = self.model.model
        layers = decoder.layers
        decoder.layers = layers[:2]
        try:
            yield
        finally:
            decoder.layers = layers

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """Returns the greedy token ids, int64 ``[rows]`` on the CPU, one for each of ``batch.sampled``."""
        return self.logits(batch).argmax(-1).cpu()

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Returns logits ``[rows, vocab]`` of the model's type, a row for each of ``batch.sampled``, or of ``rows``."""
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, start, length, _ in batch.chunks:
            if length == 1:
                tokens.append(sequence.tokens[start])
                positions.append(start)
            else:
                tokens += sequence.tokens[start : start + length]
                positions += range(start, start + length)
        inputs = {
            "input_ids": torch.tensor([tokens], device=self.device),
            "position_ids": torch.tensor([positions], device=self.device),
            "logits_to_keep": torch.tensor(
                batch.sampled if rows is None else rows, dtype=torch.int64, device=self.device
            ),
            "ragged": build_plan(batch, self.caches, self.device),
        }
        with self.device_time.passing():
            return self.model(use_cache=False, **inputs).logits[0]

    def free(self, sequence: Sequence) -> None:
        """Nothing to do: the blocks are the scheduler's, and their next holder overwrites them."""

    def _zeros(self, *shape: int) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # torch.zeros writes every page; NumPy's come from the system zeroed, and count only once they are used.
        return torch.from_numpy(np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)).view(self.dtype).view(shape)
