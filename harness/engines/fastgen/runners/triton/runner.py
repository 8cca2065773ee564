"""Forward passes in Triton on CUDA; on a CPU only under Triton's interpreter, to test them.

Ids stay on the device and feed the next pass there, so that it can be launched before they have come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.basics.errors import one_line
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import Wait
from harness.engines.fastgen.runners.triton.buffers import Buffers
from harness.engines.fastgen.runners.triton.decoder import Cache, Decoder, Ranks
from harness.engines.fastgen.runners.triton.graphs import Graphs
from harness.engines.fastgen.runners.triton.plan import Limits, Plan, Planner
from harness.engines.fastgen.runners.triton.shard import Shard
from harness.engines.fastgen.runners.triton.weights import empty, parts
from harness.engines.shared.attention_checks import refuse_unusual_attention
from harness.engines.shared.device_time import DeviceTime
from harness.engines.shared.kv_memory import affordable_blocks, free_memory
from harness.engines.shared.unusable import Unusable
from harness.machine.memory import out_of_memory
from harness.models.generation import stop_ids
from harness.models.tensors import Checkpoint

log = logging.getLogger("harness")

SMALLEST_BLOCK = 16  # tokens; the attention's keys come in matrices of no less
INTERPRETED_PROCESSORS = 16  # stands for a device's, so that long contexts are split there too


class TritonRunner:
    """One ragged pass through merged weights; passes of decodes alone replay a CUDA graph."""

    name = "triton"
    every_token = True

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.depth = int(self.device.type == "cuda")
        self.block_size = max(SMALLEST_BLOCK, 1 << (settings.engine.kv_block_size - 1).bit_length())
        self.device_time = DeviceTime(self.device)
        self.ranks = None if settings.tensor is None else _ranks(settings.tensor.group)

    def load(self) -> None:
        """Reads this rank's slices of the weights; raises UserError for what the user can mend."""
        settings, tensor = self.settings, self.settings.tensor
        processors = INTERPRETED_PROCESSORS
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton launches
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        checkpoint = Checkpoint(settings.source)
        self.config = checkpoint.model.config
        self.rotary = type(checkpoint.model.model.rotary_emb)
        architecture = self.config.to_dict()
        refuse_unusual_attention(architecture, settings.max_context, "fastgen")
        self.ids = stop_ids(checkpoint.model, settings.generation)
        rank = 0 if tensor is None else tensor.rank
        self.shard = Shard.of(architecture, rank, settings.tp)
        self.weights = empty(self.shard, checkpoint.shapes, self.dtype, self.device)
        with torch.inference_mode():
            read = checkpoint.fill(parts(self.weights, self.shard, checkpoint.shapes))
            context = settings.max_context or self.config.max_position_embeddings
            self.buffers = Buffers(self.shard, self._limits(0), context, processors, self.dtype, self.device)
        log.info("read %.2f GiB of weights", read / 2**30)
        self._results = [_Result(settings.engine.max_sequences, self.device) for _ in range(2)]

    def stop_ids(self) -> frozenset[int]:
        """Returns the checkpoint's end-of-sequence ids, none under ``generation.stop=length``."""
        return self.ids

    def allocate(self, max_blocks: int) -> int:
        """Makes the cache of ``engine.kv_memory``, of what is left once the largest passes have run, and the graphs.

        Returns:
            Its blocks, at most ``max_blocks``, as many on all ranks.

        Raises:
            UserError: the memory is not there, or does not hold one block.
        """
        settings, tensor = self.settings, self.settings.tensor
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            self._have(self.try_passes)
        layer_block = 2 * self.shard.key_width * self.block_size * self.dtype.itemsize
        block_bytes = layer_block * self.shard.layers
        free = free_memory(settings) - block_bytes  # the scratch block
        if tensor is not None:
            free = tensor.least(free)
        blocks = affordable_blocks(settings.engine.kv_memory, free, max_blocks, self.block_size, block_bytes)
        if on_cuda:
            self._have(partial(self.make, blocks))  # which captures the graphs
        else:
            self.make(blocks)
        return blocks

    def _have(self, work: Callable[[], None]) -> None:
        """Does what may show that the kernels cannot be had here; raises Unusable on all ranks where it does on one."""
        reason = None
        try:
            work()
        except Exception as error:  # of many kinds: Triton's, its compilers', the driver's
            if out_of_memory(error):
                raise
            log.info("triton's kernels cannot be used", exc_info=True)
            reason = one_line(f"{type(error).__name__}: {error}", 200)
        tensor = self.settings.tensor
        if tensor is not None and tensor.least(reason is None) == 0:
            reason = reason or "another rank cannot use them"
        if reason is not None:
            raise Unusable("triton", reason)

    @torch.inference_mode()
    def try_passes(self) -> None:
        """Computes passes as wide as they come, all on one block: compiles, and takes what libraries take of memory."""
        engine, size = self.settings.engine, self.block_size
        limits = self._limits(-(-2 * engine.token_budget // size) + engine.max_sequences)
        room = min(limits.width * size, self.settings.max_context or limits.width * size)
        decoder = self._decoder(limits, 0)
        first = min(engine.token_budget, room)
        prompt = Sequence(0, [0] * room, room, 1, blocks=[0] * limits.width, slot=0)
        chunks = [[(prompt, 0, first, first == room)]]
        if first < room:
            chunks.append([(prompt, first, min(first, room - first), True)])
        decodes = [Sequence(slot, [0], 1, 1, blocks=[0], slot=slot) for slot in range(limits.sequences)]
        chunks.append([(sequence, 0, 1, True) for sequence in decodes])
        for some in chunks:
            batch = RaggedBatch(some, 0, sum(chunk[2] for chunk in some), [chunk[0] for chunk in some])
            plan = decoder.planner.plan(batch)
            decoder.planner.send()
            decoder.choose(plan)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            del decoder
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def make(self, blocks: int) -> None:
        """Makes the cache of so many blocks, and all that depends on it."""
        self.decoder = self._decoder(self._limits(blocks), blocks)
        self.planner = self.decoder.planner
        self.graphs = Graphs(self.decoder.choose, self._fill, self.settings.engine.max_sequences, self.device)

    def warming(self) -> AbstractContextManager[None]:
        """See :meth:`Runner.warming`."""
        return nullcontext()

    @torch.inference_mode()
    def launch(self, batch: RaggedBatch) -> Wait:
        """See :meth:`Runner.launch`.

        Raises:
            IndexError: a token id is outside the model's vocabulary.
            FloatingPointError: from what is returned: a row has no logit that is a number.
        """
        plan = self.planner.plan(batch)
        outputs = plan.outputs
        rows = self.graphs.fitting(outputs) if plan.decodes else 0
        if rows:
            self.planner.pad(plan, rows)
        with self.device_time.passing():
            self.planner.send()
            if rows:
                self.graphs.replay(rows)
            else:
                self.decoder.choose(plan)
        self._results.reverse()
        return self._results[0].take(self.buffers.ids[:outputs])

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Returns logits ``[rows, vocab]`` of the model's type, on the device; see :meth:`Runner.logits`."""
        plan, shard = self.planner.plan(batch, rows), self.shard
        self.planner.send()
        self.decoder.layers(plan)
        own = self.decoder.head(plan, self.weights.head.new_empty(plan.outputs * shard.rows))
        if self.ranks is None:
            return own
        part = own.new_zeros(plan.outputs, shard.row_share)
        part[:, : shard.rows] = own
        everyone = own.new_empty(shard.tp, *part.shape)
        self.ranks.gather(everyone, part)
        return everyone.transpose(0, 1).flatten(1)[:, : shard.vocab]

    def free(self, sequence: Sequence) -> None:
        """Nothing to do: the blocks are the scheduler's, and their next holder overwrites them."""

    def _limits(self, blocks: int) -> Limits:
        engine, context = self.settings.engine, self.settings.max_context
        return Limits(
            tokens=engine.token_budget,
            sequences=engine.max_sequences,
            blocks=blocks,
            block_size=self.block_size,
            width=min(blocks, -(-context // self.block_size)) if context else blocks,
            group=self.shard.heads // self.shard.kv_heads,
            vocab=self.shard.vocab,
            sharing=engine.prefix_sharing,
        )

    def _decoder(self, limits: Limits, blocks: int) -> Decoder:
        """Returns the decoder over a new cache of ``blocks`` and the scratch block."""
        shard, size = self.shard, self.block_size
        shape = (blocks + 1, shard.kv_heads, size, shard.head_dim)

        def caches() -> list[Tensor]:
            return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(shard.layers)]

        return Decoder(
            self.weights,
            shard,
            self.buffers,
            Planner(limits, self.device),
            Cache(caches(), caches()),
            self._rotary_tables(limits.width * size),
            self.config.rms_norm_eps,
            self.ranks,
        )

    def _rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, float32 ``[positions, head_dim / 2]``, as transformers' own module makes them."""
        rotary = self.rotary(self.config).to(self.device)
        tables = rotary(torch.zeros(1, device=self.device), torch.arange(positions, device=self.device)[None])
        cosines, sines = (table[0, :, : self.shard.head_dim // 2].contiguous() for table in tables)
        return cosines, sines

    def _fill(self, rows: int) -> None:
        self.planner.pad(Plan(0, 0, 0, 0, 0), rows)
        self.planner.send()


class _Result:
    """The ids of a pass on their way to the host."""

    def __init__(self, most: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(most, dtype=torch.int32, pin_memory=cuda)
        self._come = torch.cuda.Event() if cuda else None

    def take(self, ids: Tensor) -> Wait:
        """Starts their copy; returns what waits for it."""
        host = self._host[: len(ids)]
        host.copy_(ids, non_blocking=True)
        if self._come is not None:
            self._come.record()
        return lambda: self._wait(host)

    def _wait(self, host: Tensor) -> list[int]:
        if self._come is not None:
            self._come.synchronize()
        ids: list[int] = host.tolist()
        if min(ids, default=0) < 0:
            raise FloatingPointError("the model's logits are not numbers")
        return ids


def _ranks(group: Any) -> Ranks:
    import torch.distributed as dist

    def add(tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=group)

    def gather(everyone: Tensor, mine: Tensor) -> None:
        dist.all_gather_into_tensor(everyone.flatten(), mine.flatten(), group=group)

    return Ranks(add, gather)
