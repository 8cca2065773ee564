"""The engines in this process, on tiny models with random weights, beside Hugging Face."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from harness.basics.clock import Clock
from harness.basics.errors import UserError
from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import Engine, EngineSettings
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.torch_runner import TorchRunner
from harness.engines.proof import proof
from harness.engines.scoring import Scored
from harness.models import loading
from harness.models.directory import find
from harness.models.source import Source
from harness.workload.records import Completion, Request

SIZES: dict[str, Any] = {"token_budget": 512, "max_sequences": 64, "kv_memory": 0.3}  # as a job on a CPU has them
TINY: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ANSWERS: dict[str, dict[int, list[int]]] = {}


def settings(
    model_type: str = "llama", stop: Stop = Stop.length, more: dict[str, Any] | None = None, **engine: Any
) -> EngineSettings:
    architecture = {"model_type": model_type, **TINY, **(more or {})}
    return EngineSettings(
        engine=FastGenConfig(**{"kernels": Kernels.torch, **SIZES, **engine}),
        generation=GenerationConfig(stop=stop),
        source=Source("dummy", None, None, None, architecture, False),
        dtype="float32",
        device="cpu",
        max_context=256,
    )


def requests(count: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            index=index,
            prompt="",
            output_len=rng.randint(1, 30),
            prompt_ids=tuple(rng.randrange(3, 300) for _ in range(rng.choice([1, 2, 3, 7, 20, 60, 150]))),
        )
        for index in range(count)
    ]


def generate(engine: Engine, jobs: list[Request]) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    for completion in engine.generate(iter(engine.arrange(jobs)), Clock()):
        assert completion.index not in found
        found[completion.index] = completion
    return found


def hugging_face(source: Source, jobs: list[Request], eos: int | None = None) -> dict[int, list[int]]:
    """Returns the ids that ``generate`` gives for each job, by index; the same question is asked once."""
    asked = f"{source} {jobs} {eos}"
    if asked not in ANSWERS:
        ANSWERS[asked] = _generated(source, jobs, eos)
    return copy.deepcopy(ANSWERS[asked])


def _generated(source: Source, jobs: list[Request], eos: int | None) -> dict[int, list[int]]:
    model = loading.load_model(source, dtype=torch.float32)
    model.generation_config.eos_token_id = eos
    answers = {}
    for job in jobs:
        ids = torch.tensor([job.prompt_ids])
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job.output_len, pad_token_id=0
            )
        answers[job.index] = output[0, ids.shape[1] :].tolist()
    return answers


def settings_of(
    directory: Path, dtype: str = "float32", stop: Stop = Stop.length, kernels: Kernels = Kernels.native, **engine: Any
) -> EngineSettings:
    return EngineSettings(
        engine=FastGenConfig(kernels=kernels, **{**SIZES, **engine}),
        generation=GenerationConfig(stop=stop),
        source=find(str(directory), False, need_weights=True),
        dtype=dtype,
        device="cpu",
        max_context=512,
    )


def engine_for(model_type: str = "llama", stop: Stop = Stop.length, **engine: Any) -> DsInferenceEngine:
    more = {"sliding_window": None, "pad_token_id": 0} if model_type in ("mistral", "phi3") else {"pad_token_id": 0}
    chosen = settings(model_type, stop, more)
    loaded = DsInferenceEngine(replace(chosen, engine=DsInferenceConfig(**engine)))
    loaded.load()
    return loaded


def ids(found: dict[int, Completion]) -> dict[int, list[int]]:
    return {index: completion.token_ids for index, completion in found.items()}


class LayersThatRemember(torch.nn.Module):
    """Keeps keys and values itself, as injected layers do: a forward of several tokens begins anew."""

    def __init__(self, rows: int, damage: float = 0.0) -> None:
        super().__init__()
        self.rows = rows
        self.model = loading.load_model(settings().source, dtype=torch.float32, attention="eager")
        with torch.no_grad():
            self.model.model.layers[0].self_attn.o_proj.weight.mul_(1 + damage)
        self.cache = DynamicCache()

    def reset_cache(self) -> None:
        self.cache = DynamicCache()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool, **kwargs: Any) -> Any:
        assert not use_cache and input_ids.shape[0] == self.rows
        if input_ids.shape[1] > 1:
            self.reset_cache()
        columns = self.cache.get_seq_length() + input_ids.shape[1]
        assert attention_mask.shape == (self.rows, 1, input_ids.shape[1], columns)
        return self.model(
            input_ids, attention_mask=attention_mask, past_key_values=self.cache, use_cache=True, **kwargs
        )


@torch.inference_mode()
def expected(model: Any, item: Scored) -> tuple[Tensor, bool]:
    """Returns Hugging Face's own answer: float32 ``[tokens]``, and whether greedy decoding would say the same."""
    target = torch.tensor(item.target_ids)
    ids = torch.tensor([item.context_ids + item.target_ids[:-1]])
    logits = model(ids, logits_to_keep=len(target)).logits[0]
    logprobs = logits.float().log_softmax(-1)[torch.arange(len(target)), target]
    return logprobs, bool((logits.argmax(-1) == target).all())


def team_of_two(fault: str, place: str) -> None:
    """Loads the tiny model over two ranks; rank 1's weights are damaged if ``fault`` says so."""
    from harness.ranks.rank import current
    from harness.ranks.rendezvous import Rendezvous
    from harness.ranks.replicas import Replicas

    torch.set_num_threads(1)
    rank = current()
    assert rank is not None
    rendezvous = Rendezvous(rank, failed=lambda: None)
    rendezvous.open()
    rendezvous.meet({})
    replicas = Replicas(rank, "cpu", rendezvous, 2)
    replicas.join()
    whole = TorchRunner.load

    def damaged(runner: TorchRunner) -> None:
        whole(runner)
        if fault == "damage" and rank.rank == 1:
            runner.model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)

    TorchRunner.load = damaged  # type: ignore[method-assign]
    outcome: list[Any] = []
    for _ in range(2):
        engine = FastGenEngine(replace(settings(), tensor=replicas.tensor, host_ranks=2))
        try:
            outcome.append(proof.load(engine).proof)
        except UserError as error:
            outcome.append(str(error))
    if rank.rank == int(fault == "damage"):
        Path(place).write_text(json.dumps(outcome))
