"""The Triton runner on tiny models, driven by the scheduler over a cache that is nobody's yet."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners.triton.runner import TritonRunner
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.engines.shared.order import Order
from harness.models.directory import find
from harness.models.source import Source

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def settings_of(
    source: Source | Path, dtype: str = "float32", stop: Stop = Stop.length, **engine: Any
) -> EngineSettings:
    keys = {"token_budget": 40, "max_sequences": 8, "kv_block_size": 16, "kv_memory": "4MiB", **engine}
    return EngineSettings(
        engine=FastGenConfig(kernels=Kernels.triton, order=Order.dataset, **keys),
        generation=GenerationConfig(stop=stop),
        source=source if isinstance(source, Source) else find(str(source), False, need_weights=True),
        dtype=dtype,
        device="cpu",
        max_context=256,
    )


def dummy(model_type: str = "llama", **more: Any) -> Source:
    return Source("dummy", None, None, None, {"model_type": model_type, **SIZES, **more}, False)


class Shuffled(KvBlocks):
    """Gives out blocks in no order."""

    def __init__(self, total: int, block_size: int, seed: int) -> None:
        super().__init__(total, block_size)
        self.order = random.Random(seed).sample(range(total), total)

    def take(self, count: int) -> list[int]:
        return [self.order[block] for block in super().take(count)]

    def give_back(self, blocks: list[int]) -> None:
        blocks[:] = [self.order.index(block) for block in blocks]
        super().give_back(blocks)


def prompts(lengths: list[int], vocab: int = SIZES["vocab_size"], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def computed(
    runner: TritonRunner, jobs: list[tuple[list[int], int]], budget: int, blocks: int, seed: int = 0
) -> tuple[list[list[int]], list[Tensor]]:
    """Feeds prompts, and as many chosen tokens as each job says; returns ids and logits of all tokens that were fed.

    What no pass has written is NaN. Passes of decodes are computed a second time, as a run computes them.
    """
    runner.make(blocks)
    for layer in (*runner.decoder.cache.keys, *runner.decoder.cache.values):
        layer.fill_(float("nan"))
    count = min(runner.settings.engine.max_sequences, budget)
    scheduler = Scheduler(budget, count, Shuffled(blocks, runner.block_size, seed))
    sequences = [Sequence(uid, list(ids), len(ids), output) for uid, (ids, output) in enumerate(jobs)]
    found: list[dict[int, Tensor]] = [{} for _ in jobs]
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.unfinished:
        batch = scheduler.schedule()
        logits = runner.logits(batch, list(range(batch.tokens)))
        row, ids = 0, []
        for sequence, start, length, last in batch.chunks:
            found[sequence.uid] |= {start + place: logits[row + place] for place in range(length)}
            row += length
            ids += [int(logits[row - 1].argmax())] if last else []
        if batch.decode_tokens == batch.tokens:
            assert runner.launch(batch)() == ids
        scheduler.complete(batch, ids)
    everything = [torch.stack([rows[place] for place in range(len(rows))]).float() for rows in found]
    return [sequence.tokens for sequence in sequences], everything


@torch.inference_mode()
def hugging_face(directory: Path, tokens: list[list[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns Hugging Face's logits of all tokens but the last of each sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return [model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].float() for ids in tokens]
