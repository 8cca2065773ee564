"""A pass in DeepSpeed's ragged buffers, written by NumPy out of the scheduler's batch.

``InferenceEngineV2.put`` does the same sequence by sequence, about 10 us of Python each, and lets an allocator of its
own choose the blocks, whose ``flush`` waits for the device several times a block. The scheduler has chosen them
already, out of a pool that is as large: they are written into DeepSpeed's table of blocks as they are, a row for each
of the scheduler's slots. What ``put`` keeps of a sequence (``DSSequenceDescriptor``) is not needed then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engines.fastgen.batch import RaggedBatch


class Passes:
    """The buffers of one engine: a ``RaggedBatchWrapper``, and the table of blocks of its ``DSStateManager``."""

    def __init__(self, engine: Any, block_size: int) -> None:
        self._model = engine.model()
        self._batch = engine._batch
        manager = engine._state_manager
        self._table: Tensor = manager._all_block_ids[0]  # int32 [slots, 1, blocks of a sequence], on the device
        self._staged: Tensor = manager._all_block_ids_shadow[0]  # the same on the host
        self._rows = self._staged.numpy()[:, 0]
        self._row_bytes = self._table.stride(0) * self._table.element_size()
        self._block_size = block_size

    def compute(self, batch: RaggedBatch) -> Tensor:
        """Returns a row of logits for each chunk, ``[chunks, vocab]``, on the device.

        Raises:
            RuntimeError: a sequence has not the blocks of its tokens; the kernels would write elsewhere.
        """
        self._write(batch)
        self._batch.finalize()  # DeepSpeed's own copies to the device
        self._model.prepare_batch(self._batch)
        logits: Tensor = self._model.forward(self._batch)
        return logits

    def _write(self, batch: RaggedBatch) -> None:
        """Fills what ``RaggedBatchWrapper.insert_sequence`` fills; nothing of the pass before is under way any more."""
        chunks, buffers = batch.chunks, self._batch
        count = len(chunks)
        sequences, firsts, sizes, _ = zip(*chunks, strict=True)
        starts, lengths = np.array(firsts), np.array(sizes)
        held = np.fromiter((len(sequence.blocks) for sequence in sequences), np.int64, count)
        short = np.flatnonzero(held * self._block_size < starts + lengths)
        if len(short):
            first = int(short[0])
            found = f"sequence {sequences[first].uid} has {held[first]} blocks of {self._block_size} tokens"
            raise RuntimeError(f"{found}, and {starts[first] + lengths[first]} tokens")
        self._grow(batch)
        tokens = batch.token_ids
        descriptors = np.zeros((count, 4), np.int32)  # where in the pass, how many, how many before them, unused
        descriptors[:, 0] = np.cumsum(lengths) - lengths
        descriptors[:, 1], descriptors[:, 2] = lengths, starts
        slots = np.fromiter((sequence.slot for sequence in sequences), np.int64, count)
        buffers.clear()
        buffers._batch_tokens = [torch.tensor(tokens)]
        buffers._inflight_seq_descriptors_shadow_buf = descriptors.ravel()
        buffers._token_to_seq_storage_shadow_buf = np.repeat(np.arange(count, dtype=np.int32), lengths)
        buffers._kv_blocks_ptr_buf = self._table.data_ptr() + slots * self._row_bytes
        buffers._current_tokens, buffers._current_sequences = len(tokens), count

    def _grow(self, batch: RaggedBatch) -> None:
        """Brings the table's rows of sequences that have got blocks up to date, in one copy."""
        if not batch.grown:
            return
        for sequence in batch.grown:
            self._rows[sequence.slot, : len(sequence.blocks)] = sequence.blocks
        changed = [sequence.slot for sequence in batch.grown]
        rows = slice(min(changed), max(changed) + 1)
        self._table[rows].copy_(self._staged[rows], non_blocking=True)
