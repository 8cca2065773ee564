"""Which models, types and processors the C++ forward pass is for, and what takes its place elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.engines import generate, hugging_face, requests, settings
from support.machine import EVERY_FLAG, needs_native
from support.runs import ROOT

from harness.basics.errors import UserError
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.native import checks
from harness.engines.known_model import KnownModel

pytestmark = pytest.mark.usefixtures("one_thread")

# --- what is refused ------------------------------------------------------------------------------------------------

LLAMA_7B = yaml.safe_load((ROOT / "conf" / "model" / "llama2_7b.yaml").read_text())["architecture"]


def shown(value: object) -> str:
    """Returns a parameter's name, the same in every process."""
    return str(sorted(value) if isinstance(value, set) else value)


def unsupported(architecture: dict[str, Any], dtype: str, tp: int, **more: Any) -> str | None:
    return checks.unsupported(KnownModel(architecture, dtype, tp, **more))


@pytest.fixture
def every_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cpu_flags", lambda: EVERY_FLAG)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["smollm2_135m", "llama2_7b", "llama2_13b", "llama2_70b"])
def test_the_configs_models_are_supported(every_instruction: None, name: str, dtype: str) -> None:
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    assert unsupported(architecture, dtype, 1) is None


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"dtype": "float16"}, "they compute in float32 or bfloat16, not in float16"),
        ({"tp": 2}, "they do not shard a model (parallel.tp)"),
        ({"model_type": "gemma2"}, "gemma2 is not one of the families that they compute (llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "None is not one of the families"),
        ({"auto_map": {"AutoModel": "x.py"}, "remote_code": True}, "brings its own code (model.trust_remote_code)"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights are packed (quantization_config)"),
        ({"hidden_size": None}, "its hidden_size is not known"),
        ({"intermediate_size": "11008"}, "its intermediate_size is not known"),
        ({"num_hidden_layers": 0}, "its num_hidden_layers is not known"),
        ({"num_attention_heads": -1}, "its num_attention_heads is not known"),
        ({"vocab_size": None}, "its vocab_size is not known"),
        ({"hidden_size": 4104, "head_dim": 128}, "its hidden_size 4104 is not a multiple of 16"),
        ({"intermediate_size": 11010}, "its intermediate_size 11010 is not a multiple of 16"),
        ({"head_dim": 72}, "32 query and 32 key-value heads of 72"),
        ({"head_dim": 272}, "32 query and 32 key-value heads of 272"),
        ({"num_key_value_heads": 5}, "32 query and 5 key-value heads of 128"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "its rotary embedding is scaled (dynamic; default,"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "embedding is scaled (longrope;"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "embedding is scaled (dynamic;"),
        ({"partial_rotary_factor": 0.75}, "only a part of each head is rotated (partial_rotary_factor)"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu, not silu or gelu_pytorch_tanh"),
        ({"mlp_bias": True}, "it has mlp_bias"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "see those after them (use_bidirectional_att"),
    ],
    ids=str,
)
def test_each_hazard_is_refused(every_instruction: None, more: dict[str, Any], found: str) -> None:
    given_to = {"dtype": "bfloat16", "tp": 1, "remote_code": False}
    architecture = dict(LLAMA_7B)
    architecture.pop("dtype", None)
    for key, value in more.items():
        (given_to if key in given_to else architecture)[key] = value
    reason = unsupported(architecture, **given_to)  # type: ignore[arg-type]
    assert reason is not None and found in reason and "\n" not in reason


def test_harmless_settings_are_not_refused(every_instruction: None) -> None:
    for more in (
        {"model_type": "mistral", "sliding_window": 4096},  # refused at load where it is less than the context
        {"model_type": "qwen3", "head_dim": None},
        {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1, "vocab_size": 32001},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
        {"num_key_value_heads": None, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"auto_map": {"AutoModel": "x.py"}},
    ):
        assert unsupported({**LLAMA_7B, **more}, "bfloat16", 1) is None
    packed = {**LLAMA_7B, "quantization_config": {"quant_method": "awq"}}
    assert unsupported(packed, "bfloat16", 1, dummy=True) is None
    assert unsupported({}, "bfloat16", 1) == "its config is not known before it is downloaded"


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (set(), "this processor has no avx2, fma"),
        (EVERY_FLAG - {"fma"}, "this processor has no fma"),
        ({"fma", "avx512f"}, "this processor has no avx2"),
        ({"avx2", "fma"}, None),
        (EVERY_FLAG, None),
    ],
    ids=shown,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instructions_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: str, found: str | None
) -> None:
    monkeypatch.setattr(checks, "cpu_flags", lambda: flags)
    assert unsupported(LLAMA_7B, dtype, 1) == found


@pytest.mark.parametrize(
    ("flags", "most", "taken"),
    [
        (EVERY_FLAG, "", "amx_bf16"),
        (EVERY_FLAG - {"amx_tile"}, "", "avx512_bf16"),
        (EVERY_FLAG - {"avx512_bf16"}, "", "avx512"),
        (EVERY_FLAG - {"avx512dq"}, "", "avx2"),
        ({"avx2", "fma"}, "", "avx2"),
        (EVERY_FLAG, "avx512_bf16", "avx512_bf16"),
        (EVERY_FLAG, "avx512", "avx512"),
        (EVERY_FLAG, "avx2", "avx2"),
        ({"avx2", "fma"}, "avx512", "avx2"),
        (EVERY_FLAG - {"avx2"}, "avx2", None),
    ],
    ids=shown,
)
def test_the_fastest_instructions_that_may_be_used_are(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], most: str, taken: str | None
) -> None:
    monkeypatch.setattr(checks, "cpu_flags", lambda: flags)
    monkeypatch.setenv("HARNESS_CPU_ISA", most)
    assert checks.instruction_set() == taken
    assert checks.instruction_set("float32") == ("avx512_bf16" if taken == "amx_bf16" else taken)  # it has none


@pytest.mark.parametrize("kernels", [Kernels.auto, Kernels.native])
def test_instructions_that_nobody_knows_are_refused(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    monkeypatch.setenv("HARNESS_CPU_ISA", "avx1024")
    line = (
        "HARNESS_CPU_ISA: 'avx1024' is not known; choose one of amx_bf16, avx512_bf16, avx512, avx2, or leave it unset"
    )
    with pytest.raises(UserError, match=f"^{line}$"):
        FastGenEngine(settings(kernels=kernels))


# --- which kernels are used -----------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("family", checks.COMPUTED.families)
def test_made_up_weights_are_computed_as_a_checkpoints_are(family: str) -> None:
    more = {"pad_token_id": 0, "sliding_window": None}
    chosen, jobs = settings(family, more=more, kernels=Kernels.auto, kv_memory="4MiB"), requests(8)
    engine = FastGenEngine(chosen)
    assert (chosen.source.kind, engine.kernels, engine.notes) == ("dummy", "native", [])
    engine.load()
    found = generate(engine, jobs)
    assert {index: completion.token_ids for index, completion in found.items()} == hugging_face(chosen.source, jobs)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/g++", "no C++ compiler: /nonexistent/g++ is not installed (CXX names another)"),
        ("false", "{false} cannot compile the kernels: it ended with status 1"),
        ("/nonexistent/ccache g++", "no C++ compiler: /nonexistent/ccache g++ is not installed (CXX names another)"),
    ],
)
def test_without_a_compiler_auto_takes_torch(
    every_instruction: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    reason = reason.format(false=shutil.which("false"))
    engine = FastGenEngine(settings(kernels=Kernels.auto))
    assert engine.kernels == "torch"
    assert engine.notes == [f"engine.kernels=auto took torch, not the native kernels: {reason}"]
    with pytest.raises(UserError) as refused:
        FastGenEngine(settings(kernels=Kernels.native))
    assert str(refused.value).startswith(f"engine.kernels: native: {reason.strip()}")
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in ("", ".lock")]


@pytest.mark.parametrize("kernels", [Kernels.auto, Kernels.native])
def test_a_model_that_is_not_computed_is_left_to_torch(every_instruction: None, kernels: Kernels) -> None:
    chosen = settings(more={"mlp_bias": True}, kernels=kernels)
    if kernels is Kernels.native:
        with pytest.raises(UserError, match=r"^engine\.kernels: native: it has mlp_bias; use engine\.kernels=torch"):
            FastGenEngine(chosen)
        return
    engine = FastGenEngine(chosen)
    assert engine.kernels == "torch"
    assert engine.notes == ["engine.kernels=auto took torch, not the native kernels: it has mlp_bias"]
