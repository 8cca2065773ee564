"""DeepSpeed's ragged engine behind our runner on tiny models, and a judge of its tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.basics.clock import Clock
from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import Chunk, RaggedBatch, Sequence
from harness.engines.fastgen.config import FastGenConfig
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner
from harness.engines.shared.order import Order
from harness.models.directory import find
from harness.models.source import Source
from harness.models.tokenizer import ByteTokenizer
from harness.workload.records import Completion, Request
from support.deepspeed_kernels import emulate
from support.models import save_model

TINY: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(
    directory: Path, model_type: str = "llama", dtype: torch.dtype = torch.float16, sharp: float = 1.0, **more: Any
) -> Path:
    return save_model(directory, model_type, dtype, sharp, **{**TINY, **more})


def settings(directory: Path | None, dtype: str = "float16", **engine: Any) -> EngineSettings:
    source = Source("dummy", None, None, None, {"model_type": "llama", **TINY}, False)
    if directory is not None:
        source = find(str(directory), False, need_weights=True)
    keys = {"token_budget": 160, "max_sequences": 8, "kv_block_size": 128, "kv_memory": "64MiB", **engine}
    return EngineSettings(
        engine=FastGenConfig(order=Order.dataset, **keys),
        generation=GenerationConfig(stop=Stop.length),
        source=source,
        dtype=dtype,
        device="cpu",
        max_context=2048,
    )


def loaded(chosen: EngineSettings, blocks: int = 64) -> DeepSpeedRunner:
    runner = DeepSpeedRunner(chosen)
    runner.load()
    assert runner.allocate(blocks) == blocks
    return runner


def chunk(uid: int, tokens: int, start: int, length: int) -> Chunk:
    """Returns a chunk of a sequence whose slot and blocks, of 128 tokens, follow from its uid."""
    blocks = list(range(4 * uid, 4 * uid + -(-tokens // 128)))
    sequence = Sequence(uid, [3 + (uid + place) % 300 for place in range(tokens)], tokens, 8, blocks=blocks, slot=uid)
    return sequence, start, length, start + length == tokens


def batch(*chunks: Chunk) -> RaggedBatch:
    sequences = [sequence for sequence, *_ in chunks]
    return RaggedBatch(list(chunks), 0, sum(length for _, _, length, _ in chunks), sequences)


def requests(
    count: int, seed: int = 0, lengths: tuple[int, ...] = (1, 3, 100, 120, 127, 128, 300), most: int = 16
) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            index=index,
            prompt="",
            output_len=rng.randint(2, most),
            prompt_ids=tuple(rng.randrange(3, 320) for _ in range(rng.choice(lengths))),
        )
        for index in range(count)
    ]


def generate(runner: DeepSpeedRunner, jobs: list[Request], blocks: int) -> tuple[dict[int, Completion], FastGenEngine]:
    engine = FastGenEngine(runner.settings)
    engine.tokenizer = ByteTokenizer()
    engine.runner = runner
    engine.total_blocks = blocks
    found = {completion.index: completion for completion in engine.generate(iter(jobs), Clock())}
    assert sorted(found) == [job.index for job in jobs]
    return found, engine


class Judge:
    """Hugging Face's model in float32 over the same rounded weights."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def worst_gap(self, jobs: list[Request], found: dict[int, list[int]]) -> float:
        """Returns by how much a chosen token's logit ever was below the best, in standard deviations of the logits."""
        worst = 0.0
        for job in jobs:
            ids = [*(job.prompt_ids or ()), *found[job.index]]
            logits = self.model(torch.tensor([ids[:-1]])).logits[0, len(job.prompt_ids or ()) - 1 :]
            chosen = logits.gather(1, torch.tensor(found[job.index])[:, None])[:, 0]
            worst = max(worst, float(((logits.amax(-1) - chosen) / logits.std(-1)).max()))
        return worst


def gap_of(runner: DeepSpeedRunner, judge: Judge, jobs: list[Request], blocks: int = 64) -> float:
    found, _ = generate(runner, jobs, blocks)
    for job in jobs:
        assert len(found[job.index].token_ids) == job.output_len
    return judge.worst_gap(jobs, {index: completion.token_ids for index, completion in found.items()})


def float_quantize(values: Tensor, exponent: int, mantissa: int, rounding: str) -> Tensor:
    """Rounds to the nearest value with 3 bits of exponent and 2 of mantissa, as qtorch does."""
    assert (exponent, mantissa, rounding) == (3, 2, "nearest")
    step = 2.0 ** (values.abs().clamp(min=0.25).log2().floor() - 2)
    return ((values / step).round() * step).clamp(-28.0, 28.0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch.setattr)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


ROUNDING = {"float16": 0.01, "bfloat16": 0.08}  # of the logits' standard deviation; a wrong token is off by 1 to 3
