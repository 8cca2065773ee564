"""Llama 3 through every engine that takes it: a vocabulary of 128k, scaled rotary embedding, several end ids.

Tiny models with random weights, of its vocabulary and its rotary settings but for the length from which they scale.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.engines import generate, hugging_face, ids, requests, settings
from support.machine import EVERY_FLAG, needs_native
from support.models import save_model
from support.runs import ROOT

from harness.config.schema import Stop
from harness.engines.base import EngineSettings
from harness.engines.baseline.config import BaselineConfig
from harness.engines.baseline.engine import BaselineEngine
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.fastgen.runners.triton import checks as triton_checks
from harness.engines.known_model import KnownModel
from harness.models.directory import find
from harness.workload.records import Request

LLAMA3 = yaml.safe_load((ROOT / "conf" / "model" / "llama3_1_8b.yaml").read_text())["architecture"]
SCALES_FROM = 32  # tokens: our prompts are on both sides of it
TINY: dict[str, Any] = {
    "vocab_size": LLAMA3["vocab_size"],
    "rope_parameters": {**LLAMA3["rope_parameters"], "original_max_position_embeddings": SCALES_FROM},
    "eos_token_id": LLAMA3["eos_token_id"],
    "bos_token_id": LLAMA3["bos_token_id"],
    "rms_norm_eps": LLAMA3["rms_norm_eps"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
OF_THE_CONFIGS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


def spread(jobs: list[Request]) -> list[Request]:
    """Returns the requests with ids from all over the vocabulary."""
    wide = [tuple(token * 427 % TINY["vocab_size"] for token in job.prompt_ids or ()) for job in jobs]
    return [replace(job, prompt_ids=ids) for job, ids in zip(jobs, wide, strict=True)]


JOBS = spread(requests(6))


def tiny(**changed: Any) -> EngineSettings:
    return settings(more=TINY | changed, token_budget=40, max_sequences=8, kv_block_size=16, kv_memory="4MiB")


def ends_of(jobs: list[Request]) -> tuple[list[int], dict[int, list[int]]]:
    """Returns three end ids that the model chooses by itself, and what Hugging Face generates up to one of them."""
    free = hugging_face(tiny().source, jobs)
    chosen = sorted({tokens[len(tokens) // 2] for tokens in free.values() if len(tokens) > 2})[:3]
    cut = {}
    for index, tokens in free.items():
        at = next((place for place, token in enumerate(tokens) if token in chosen), len(tokens) - 1)
        cut[index] = tokens[: at + 1]
    assert cut != free
    return chosen, cut


def test_the_jobs_are_on_both_sides_of_the_length_from_which_rotary_embedding_scales() -> None:
    lengths = [len(job.prompt_ids or ()) for job in JOBS]
    assert min(lengths) < SCALES_FROM < max(lengths)
    plain = {"rope_type": "default", "rope_theta": LLAMA3["rope_parameters"]["rope_theta"]}
    assert hugging_face(tiny().source, JOBS) != hugging_face(tiny(rope_parameters=plain).source, JOBS)


@pytest.mark.parametrize("kernels", [Kernels.torch, pytest.param(Kernels.native, marks=needs_native)])
def test_fastgen_gives_hugging_faces_ids(kernels: Kernels) -> None:
    chosen = tiny()
    assert isinstance(chosen.engine, FastGenConfig)
    engine = FastGenEngine(replace(chosen, engine=replace(chosen.engine, kernels=kernels)))
    engine.load()
    assert ids(generate(engine, JOBS)) == hugging_face(chosen.source, JOBS)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_fastgen_gives_hugging_faces_ids_on_triton_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    directory = save_model(tmp_path, "llama", torch.float32, **TINY)
    chosen = replace(tiny(), source=find(str(directory), False, need_weights=True))
    assert isinstance(chosen.engine, FastGenConfig)
    engine = FastGenEngine(replace(chosen, engine=replace(chosen.engine, kernels=Kernels.triton)))
    engine.load()
    few = [replace(job, output_len=min(job.output_len or 1, 4)) for job in JOBS]
    assert ids(generate(engine, few)) == hugging_face(chosen.source, few)


def test_ds_inference_gives_hugging_faces_ids() -> None:
    engine = DsInferenceEngine(replace(tiny(), engine=DsInferenceConfig(batch_size=3)))
    engine.load()
    assert ids(generate(engine, JOBS)) == hugging_face(engine.settings.source, JOBS)


@pytest.mark.slow
def test_baseline_gives_hugging_faces_ids() -> None:
    engine = BaselineEngine(replace(tiny(), engine=BaselineConfig()))
    engine.load()
    assert ids(generate(engine, JOBS)) == hugging_face(engine.settings.source, JOBS)


@pytest.mark.parametrize(
    "kind",
    [FastGenEngine, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (DsInferenceEngine, BaselineEngine))],
)
def test_each_of_several_end_ids_ends_a_sequence(kind: type[Any]) -> None:
    chosen, expected = ends_of(JOBS)
    known = tiny(eos_token_id=chosen)
    known = replace(known, generation=replace(known.generation, stop=Stop.eos))
    others = {DsInferenceEngine: DsInferenceConfig(batch_size=3), BaselineEngine: BaselineConfig()}
    engine = kind(replace(known, engine=others.get(kind, known.engine)))
    engine.load()
    found = generate(engine, JOBS)
    assert ids(found) == expected
    for index, completion in found.items():
        assert completion.finish_reason == ("eos" if expected[index][-1] in chosen else "length")


@pytest.mark.parametrize("name", OF_THE_CONFIGS)
def test_kernels_of_our_own_take_the_models_of_the_configs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but Phi-4, whose family keeps query, key and value in one matrix, and which is native's alone."""
    monkeypatch.setattr(native_checks, "cpu_flags", lambda: EVERY_FLAG)
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    known = KnownModel(architecture, "bfloat16", 1)
    taken = [found is None for found in (native_checks.unsupported(known), triton_checks.unsupported(known))]
    assert taken == [True, name != "phi4"]
