"""Models whose attention our kernels do not compute: refused in one line, whose advice is followed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import generate, hugging_face, requests, settings
from support.machine import skip_unless_deepspeed_takes
from support.models import LONGROPE

from harness.basics.errors import UserError
from harness.engines.base import Engine, EngineSettings
from harness.engines.baseline.config import BaselineConfig
from harness.engines.baseline.engine import BaselineEngine
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.engine import DsInferenceEngine
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.proof import proof
from harness.engines.shared import auto_tp

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = {"sliding_window": 256, "pad_token_id": 0}
LONG = {"rope_parameters": LONGROPE}
# By family: what of its config matters, and what the refusal says.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": (WINDOW | {"attn_logit_softcapping": 2.0}, r"softcap\w*=2.0\); use engine=baseline$"),
    "vaultgemma": (WINDOW | {"attn_logit_softcapping": 2.0}, r"softcap\w*=2.0\); use engine=baseline$"),
    "gpt_oss": (WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}, r"\(s_aux\); use engine=baseline$"),
    "bloom": ({"n_layer": 2, "n_head": 6}, "; use engine=baseline$"),
    "codegen": (
        {"n_embd": 96, "n_layer": 2, "n_head": 4, "num_attention_heads": 4, "rotary_dim": 8},
        "; use engine=baseline$",
    ),
    "stablelm": ({}, "; use engine=baseline$"),
    "nemotron": ({}, "; use engine=baseline$"),
    "mistral": ({"sliding_window": 20}, "sliding window 20.*; use engine=baseline, or model.max_context=20$"),
    "phi3": (
        LONG | {"pad_token_id": 0, "sliding_window": None, "original_max_position_embeddings": 32},
        "beyond 32 tokens; use model.max_context=32, or engine=baseline$",
    ),
    "llama": (LONG, "beyond 32 tokens; use model.max_context=32, or engine=baseline$"),
}


def engines_of(chosen: EngineSettings) -> list[Engine]:
    return [
        FastGenEngine(chosen),
        DsInferenceEngine(replace(chosen, engine=DsInferenceConfig(batch_size=4))),
    ]


@pytest.mark.parametrize("family", ODD)
def test_what_is_not_computed_is_refused_in_one_line(family: str) -> None:
    more, line = ODD[family]
    for engine in engines_of(settings(family, more=more)):
        with pytest.raises(UserError, match=rf"^model: {family} .*{line}") as caught:
            proof.load(engine)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "bloom", "stablelm", "phi3"])
def test_the_refusals_advice_works(family: str) -> None:
    chosen = settings(family, more=ODD[family][0])
    jobs = requests(4)
    engine = BaselineEngine(replace(chosen, engine=BaselineConfig()))
    engine.load()
    found = {index: completion.token_ids for index, completion in generate(engine, jobs).items()}
    assert found == hugging_face(chosen.source, jobs)


@pytest.mark.parametrize("family", ["mistral", "phi3", "llama"])
def test_a_smaller_context_is_a_way_out_where_it_is_said_to_be(family: str) -> None:
    limit = 20 if family == "mistral" else 32
    chosen = replace(settings(family, more=ODD[family][0]), max_context=limit)
    jobs = [job for job in requests(24, seed=4) if len(job.prompt_ids or ()) + (job.output_len or 0) <= limit]
    assert len(jobs) > 5
    expected = hugging_face(chosen.source, jobs)
    for engine in engines_of(chosen):
        engine = proof.load(engine)
        found = {index: completion.token_ids for index, completion in generate(engine, jobs).items()}
        assert found == expected
        assert engine.proof is not None and engine.proof["largest_distance"] < proof.EXACT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_frequencies_stay_float32_under_deepspeed(dtype: str) -> None:
    skip_unless_deepspeed_takes(dtype)
    chosen = replace(settings(), dtype=dtype)
    whole = auto_tp.load_whole(chosen, "sdpa").model.rotary_emb.inv_freq.clone()
    engine = DsInferenceEngine(replace(chosen, engine=DsInferenceConfig(batch_size=4)))
    engine.load()
    rotary = engine.batches.engine.module.model.rotary_emb
    assert rotary.inv_freq.dtype is torch.float32
    assert torch.equal(rotary.inv_freq, whole)
    assert engine.batches.engine.module.model.norm.weight.dtype is getattr(torch, dtype)


def test_kernels_auto_refuses_the_same() -> None:
    with pytest.raises(UserError, match=r"^model: gpt_oss models .*\(s_aux\)"):
        proof.load(FastGenEngine(settings("gpt_oss", more=ODD["gpt_oss"][0], kernels=Kernels.auto)))
