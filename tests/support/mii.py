"""MII's real pipeline with a forward pass of the tests' own, where there is no GPU to compute it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase
from deepspeed.inference.v2.ragged.manager_configs import KVCacheConfig
from deepspeed.inference.v2.ragged.sequence_descriptor import DSSequenceDescriptor

from harness.basics.clock import Clock
from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import EngineSettings
from harness.engines.mii.config import MiiConfig
from harness.engines.mii.settings import model_settings
from harness.engines.shared import ragged_kernels
from harness.engines.shared.kv_blocks import KvBlocks
from harness.engines.shared.order import Order
from harness.models import loading
from harness.models.ends import Ends
from harness.models.source import Source
from harness.models.tokenizer import ByteTokenizer
from harness.ranks.rank import free_port
from harness.workload.records import Completion, Request

if TYPE_CHECKING:
    from harness.engines.mii.engine import MiiEngine

VOCABULARY = 300
CONTEXT = 256
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
Logits = Callable[[list[int]], torch.Tensor]


class Sequences:
    """DeepSpeed's ``DSStateManager`` without its CUDA buffers: real sequence descriptors over a pool of blocks."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.pool = KvBlocks(blocks, block_size)
        self.known: dict[int, DSSequenceDescriptor] = {}
        self.held: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}

    @property
    def n_tracked_sequences(self) -> int:
        return len(self.known)

    @property
    def free_blocks(self) -> list[int]:
        return [self.pool.free]

    def get_sequence(self, uid: int) -> DSSequenceDescriptor | None:
        return self.known.get(uid)

    def feed(self, uid: int, tokens: list[int], model: Any) -> list[int]:
        """Takes the blocks for ``tokens`` more tokens; returns all tokens of the sequence."""
        if uid not in self.known:
            table = torch.zeros(1, self.pool.total, dtype=torch.int32)
            self.known[uid] = DSSequenceDescriptor(0, (table,), (table.clone(),))
            self.held[uid], self.tokens[uid] = [], []
        sequence = self.known[uid]
        granted, blocks = model.get_kv_requirements(sequence, len(tokens), self.pool.free)
        assert granted == len(tokens), "the cache has no room for these tokens"
        if blocks > 0:
            taken = self.pool.take(blocks)
            self.held[uid] += taken
            sequence.extend_kv_cache(torch.tensor(taken, dtype=torch.int32))
        sequence.pre_forward(len(tokens))
        sequence.post_forward()
        self.tokens[uid] += tokens
        return self.tokens[uid]

    def flush_sequence(self, uid: int) -> None:
        self.pool.give_back(self.held.pop(uid))
        del self.known[uid], self.tokens[uid]


class BlockArithmetic:
    """The part of DeepSpeed's model class that counts KV blocks; the code is DeepSpeed's."""

    get_kv_requirements = DSTransformerModelBase.get_kv_requirements
    get_remaining_block_capacity = DSTransformerModelBase.get_remaining_block_capacity

    def __init__(self, block_size: int) -> None:
        self.attn = SimpleNamespace(kv_block_size=block_size)

    def kv_cache_config(self) -> tuple[KVCacheConfig]:
        return (KVCacheConfig(block_size=self.attn.kv_block_size, cache_shape=(1, 1, 1)),)


class CpuEngine(InferenceEngineV2):
    """DeepSpeed's engine with its own bookkeeping, whose logits come from a function of all tokens so far."""

    def __init__(self, config: Any, blocks: int, block_size: int, logits_of: Logits) -> None:
        self._config = config
        self._state_manager = Sequences(blocks, block_size)
        self._model = BlockArithmetic(block_size)
        self.logits_of = logits_of
        self.atoms = config.state_manager.max_ragged_sequence_count  # DeepSpeed makes their buffer as long as this
        self.passes: list[list[int]] = []  # tokens of each sequence, pass by pass

    def put(self, batch_uids: Any, batch_tokens: Any, do_checks: bool = True) -> torch.Tensor:
        lengths = [len(tokens) for tokens in batch_tokens]
        manager = self._config.state_manager
        assert sum(lengths) <= manager.max_ragged_batch_size
        assert len(lengths) <= manager.max_ragged_sequence_count
        assert sum(-(-length // ragged_kernels.SMALLEST_ATOM) for length in lengths) <= self.atoms
        self.passes.append(lengths)
        return torch.stack(
            [
                self.logits_of(self._state_manager.feed(uid, tokens.tolist(), self._model))
                for uid, tokens in zip(batch_uids, batch_tokens, strict=True)
            ]
        )


def successor(tokens: list[int]) -> int:
    """Returns the token that :func:`counting` makes the largest."""
    return (7 * tokens[-1] + 13 * len(tokens) + sum(tokens[:3])) % VOCABULARY


def counting(tokens: list[int]) -> torch.Tensor:
    """Returns logits of which the largest depends on the last token, the first ones and how many there are."""
    return torch.nn.functional.one_hot(torch.tensor(successor(tokens)), VOCABULARY).float()


def counted(job: Request, stops: frozenset[int] = frozenset()) -> list[int]:
    """Returns what a request must give on :func:`counting`."""
    tokens = list(job.prompt_ids or ())
    output: list[int] = []
    while len(output) < (job.output_len or 0) and not (output and output[-1] in stops):
        output.append(successor(tokens))
        tokens.append(output[-1])
    return output


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MII waits for the GPU, then a second for its subscribers, in every pipeline it makes; here are neither."""
    from mii.batching import ragged_batching

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ragged_batching, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def settings_of(source: Source | None = None, stop: Stop = Stop.length, **engine: Any) -> EngineSettings:
    return EngineSettings(
        engine=MiiConfig(
            **{"token_budget": 512, "max_sequences": 64, "order": Order.longest_first, "kv_memory": 0.3, **engine}
        ),
        generation=GenerationConfig(stop=stop),
        source=source or Source("directory", "/models/llama", None, None, LLAMA, False),
        dtype="bfloat16",
        device="cpu",
        max_context=CONTEXT,
    )


def pipeline_of(
    settings: EngineSettings, kind: Any, logits_of: Logits, blocks: int, block_size: int, port: int = 0
) -> Any:
    from mii.config import ModelConfig

    from harness.engines.mii.pipeline import RequestPipeline, TokenIds

    tokens = TokenIds(VOCABULARY)
    memory = {"mode": "allocate", "size": blocks}
    config = ModelConfig(**model_settings(settings, "/models/llama", tokens, memory, port or free_port(), free_port()))
    engine = CpuEngine(config.inference_engine_config, blocks, block_size, logits_of)
    ours = {"max_sequences": settings.engine.max_sequences} if issubclass(kind, RequestPipeline) else {}
    return kind(inference_engine=engine, tokenizer=tokens, model_config=config, **ours)


def engine_on_cpu(
    settings: EngineSettings, logits_of: Logits = counting, blocks: int = 400, block_size: int = 8
) -> MiiEngine:
    """Returns the engine as ``load`` leaves it, but for who computes the logits."""
    from harness.engines.mii.engine import MiiEngine
    from harness.engines.mii.pipeline import RequestPipeline

    engine = MiiEngine(settings)
    engine.tokenizer = ByteTokenizer()
    engine.ends = Ends()
    engine.pipeline = pipeline_of(settings, RequestPipeline, logits_of, blocks, block_size)
    return engine


def run(engine: MiiEngine, jobs: list[Request]) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    for completion in engine.generate(iter(engine.arrange(jobs)), Clock()):
        assert completion.index not in found
        found[completion.index] = completion
    assert not engine.pipeline.active
    assert engine.pipeline.reserved == 0
    assert engine.pipeline.inference_engine.free_blocks == [engine.pipeline.total_blocks]
    return found


def hugging_face(model: Any, job: Request, eos: list[int] | None) -> list[int]:
    ids = torch.tensor([job.prompt_ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.output_len,
            pad_token_id=0,
            eos_token_id=eos,
        )
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def tiny() -> Any:
    source = Source("dummy", None, None, None, LLAMA, False)
    model = loading.load_model(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def last_logits(model: Any) -> Logits:
    @torch.inference_mode()
    def logits_of(tokens: list[int]) -> torch.Tensor:
        padded = tokens + [0] * (-len(tokens) % 64)  # causal: what follows changes nothing, and few shapes are fast
        return model(torch.tensor([padded]), use_cache=False).logits[0, len(tokens) - 1]

    return logits_of


@pytest.fixture(autouse=True)
def nothing_unsupported(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What DeepSpeed's kernels cannot run has tests of its own."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(ragged_kernels, "unsupported", lambda *what, **more: None)
