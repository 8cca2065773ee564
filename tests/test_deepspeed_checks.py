"""What DeepSpeed's ragged kernels cannot compute is refused; what was read in its source is still there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import ragged
from support.ragged import loaded, save, settings
from support.runs import ROOT

from harness.basics.errors import UserError
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner
from harness.engines.known_model import KnownModel
from harness.engines.shared import ragged_kernels as checks

kernels, tiny = ragged.kernels, ragged.tiny

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is refused ------------------------------------------------------------------------------------------------

LLAMA_7B = yaml.safe_load((ROOT / "conf" / "model" / "llama2_7b.yaml").read_text())["architecture"]


def unsupported(
    architecture: dict[str, Any], dtype: str, tp: int, quantization: str | None = None, **more: Any
) -> str | None:
    return checks.unsupported(KnownModel(architecture, dtype, tp, **more), quantization)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "name",
    [
        "llama2_7b",
        "llama2_13b",
        "llama2_70b",
        "llama3_1_8b",
        "llama3_1_70b",
        "llama3_3_70b",
        "mistral_7b",
        "qwen2_5_32b",
    ],
)
def test_models_of_the_configs_are_supported(name: str, tp: int, dtype: str) -> None:
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    assert unsupported(architecture, dtype, tp, max_context=4096) is None


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"model_type": "qwen3"}, "qwen3 is not one of the families"),
        ({"dtype": "float32"}, "they compute in float16 or bfloat16, not in float32"),
        ({"num_attention_heads": 96, "num_key_value_heads": 32, "hidden_size": 12288}, "is a ratio of 3, not one of"),
        ({"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16}, "its head size is 32, not one of"),
        ({"head_dim": 64}, "32 heads of 64 are not its hidden_size 4096"),
        (
            {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
            "adds up wrongly at hidden_size 256",
        ),
        ({"hidden_size": 16512, "num_attention_heads": 129, "num_key_value_heads": 129}, "16512 is above 16384"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary embedding is scaled (yarn;"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary embedding is scaled (dynamic;"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.75, "model_type": "phi3"}, "partial_rotary_factor 0.75"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu, not silu"),
        ({"attention_bias": True}, "it has attention_bias"),
        ({"mlp_bias": True}, "it has mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 1024}, "slides over 1024 tokens (model.max_context=1024"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "slides over 4096 tokens"),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, "slides over 1024 tokens"),
        ({"intermediate_size": 11010}, "11010 cannot be split over 1 ranks in steps of 32"),
        ({"intermediate_size": 28704}, "28704 is above 28672"),
        ({"vocab_size": 32004}, "vocab_size 32004 is not a multiple of 8"),
        ({"vocab_size": 32008, "tp": 2}, "vocab_size 32008 is not a multiple of 8 a rank"),
        ({"num_key_value_heads": 4, "tp": 3}, "32 query and 4 key-value heads cannot be split over 3 ranks"),
        ({"num_key_value_heads": 4, "tp": 6}, "32 query and 4 key-value heads cannot be split over 6 ranks"),
        ({"num_key_value_heads": 2, "tp": 10}, "3 query to 1 key-value heads a rank is a ratio of 3"),
        ({"num_key_value_heads": 2, "tp": 4, "num_attention_heads": 44, "hidden_size": 5632}, "is a ratio of 11"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights are packed"),
        ({"auto_map": {"AutoModel": "x.py"}, "remote_code": True}, "brings its own code"),
        ({"quantization": "wf6af16", "dtype": "bfloat16"}, "wf6af16 computes with float16 activations"),
        ({"quantization": "wf6af16", "tp": 8}, "the gate-up weight is 2752 x 4096 a rank"),
        ({"quantization": "wf6af16", "intermediate_size": 11040}, "the gate-up weight is 22080 x 4096"),
        ({"quantization": "wf6af16", "intermediate_size": 384, "tp": 4}, "gate-up weight is 192 x 4096 a rank"),
        ({"vocab_size": None}, "its vocab_size is not known"),
    ],
    ids=str,
)
def test_each_hazard_is_refused(more: dict[str, Any], found: str) -> None:
    given_to = {"dtype": "float16", "tp": 1, "quantization": None, "remote_code": False}
    architecture = dict(LLAMA_7B)
    architecture.pop("dtype")
    for key, value in more.items():
        (given_to if key in given_to else architecture)[key] = value
    reason = unsupported(architecture, **given_to)
    assert reason is not None and found in reason and "\n" not in reason


def test_harmless_settings_are_not_refused() -> None:
    for more in (
        {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        {"rms_norm_eps": 0.1, "tie_word_embeddings": True},
    ):
        assert unsupported({**LLAMA_7B, **more}, "bfloat16", 1) is None
    packed = {**LLAMA_7B, "quantization_config": {"quant_method": "awq"}, "auto_map": {"AutoModel": "x.py"}}
    assert unsupported(packed, "float16", 1, dummy=True) is None
    window = {**LLAMA_7B, "model_type": "mistral", "sliding_window": 1024}
    assert unsupported(window, "float16", 1, max_context=1024) is None
    assert unsupported(LLAMA_7B, "float16", 2, quantization="wf6af16") is None
    assert unsupported({}, "float16", 1) == "its config is not known before it is downloaded"


def test_the_runner_refuses_too(kernels: None, tmp_path: Path) -> None:
    runner = DeepSpeedRunner(settings(save(tmp_path, num_attention_heads=8, num_key_value_heads=8, hidden_act="gelu")))
    with pytest.raises(UserError, match=r"^engine\.kernels: .*hidden_act is gelu, not silu; use engine\.kernels=torch"):
        runner.load()


def test_devices() -> None:
    assert [checks.device_unsupported(None, major) is None for major in (7, 8, 9, 10, 12)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert checks.device_unsupported("wf6af16", 8) is None
    assert "needs compute capability 8.x" in str(checks.device_unsupported("wf6af16", 9))


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "tools" / "bin"
    tools.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CUDA_HOME", str(tools.parent))
    for name in ("dskernels", "qtorch"):
        monkeypatch.syspath_prepend(tmp_path / name)
        with monkeypatch.context() as before:
            before.setitem(sys.modules, name, None)  # as if it were not installed
            if name == "qtorch":
                assert "qtorch" in str(checks.not_installed("wf6af16"))
                assert "no nvcc" in str(checks.not_installed())
            else:
                assert checks.not_installed() == "the package deepspeed-kernels is not installed"
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "__init__.py").touch()
        importlib.invalidate_caches()
    (tools / "nvcc").touch(mode=0o755)
    assert "no g++" in str(checks.not_installed("wf6af16"))
    for tool in ("g++", "ninja"):
        (tools / tool).touch(mode=0o755)
    assert checks.not_installed("wf6af16") is None
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "0.19.2+cu130")
    assert "DeepSpeed 0.19.2+cu130 rounds rotary frequencies" in str(checks.not_installed())


# --- what was read in DeepSpeed's source is still there -------------------------------------------------------------


def test_limits_are_deepspeeds(kernels: None) -> None:
    from deepspeed.inference.v2.kernels.core_ops import CUDABiasActivation, CUDAGatedActivation, CUDAWf6Af16Linear
    from deepspeed.inference.v2.kernels.ragged_ops import BlockedFlashAttn, BlockedRotaryEmbeddings
    from deepspeed.inference.v2.model_implementations.sharding.types import DEFAULT_SHARD_GRANULARITY
    from deepspeed.inference.v2.modules.configs import DSNormConfig

    assert list(checks.HEAD_DIMS) == BlockedRotaryEmbeddings.supported_head_sizes
    assert list(checks.QUERY_RATIOS) == BlockedRotaryEmbeddings.supported_q_ratios
    assert [dtype.name for dtype in BlockedFlashAttn.supported_dtypes] == ["fp16", "bf16"]
    assert checks.INTERMEDIATE_GRANULE == DEFAULT_SHARD_GRANULARITY
    assert DSNormConfig.model_fields["eps"].default == 1e-5
    with pytest.raises(ValueError, match="divisible by 8"):
        CUDABiasActivation(checks.VOCABULARY_GRANULE + 4, torch.float16, 6)
    CUDAGatedActivation(checks.INTERMEDIATE_MOST, torch.float16, 5)
    for out_features, in_features in ((checks.FP6_OUT_GRANULE + 64, 64), (256, checks.FP6_IN_GRANULE + 32)):
        with pytest.raises(ValueError, match="multiple of 256 and 64"):
            CUDAWf6Af16Linear()(*[None] * 5, out_features, 1, in_features)


def test_deepspeeds_own_checks_of_a_pass_still_raise(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny))
    with pytest.raises(TypeError):
        runner.engine.put([0], [torch.tensor([5])])


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 12))
def test_heads_are_split_as_deepspeed_splits_them(heads: int, kv_heads: int, tp: int) -> None:
    from deepspeed.inference.v2.model_implementations.sharding import get_local_heads

    try:
        expected = [get_local_heads(rank, tp, heads, kv_heads) for rank in range(tp)]
    except ValueError:
        expected = None
    assert checks.local_heads(heads, kv_heads, tp) == expected


@given(st.integers(1, 2000), st.integers(1, 12), st.sampled_from([1, 32, 64]))
def test_sizes_are_split_as_deepspeed_splits_them(chunks: int, ranks: int, granule: int) -> None:
    from deepspeed.inference.v2.model_implementations.sharding.utils import get_shard_endpoints

    ends = [get_shard_endpoints(chunks * granule, rank, ranks, granule) for rank in range(ranks)]
    assert checks.shares(chunks * granule, ranks, granule) == [end - start for start, end in ends]
