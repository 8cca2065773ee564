"""The Triton pass on a CPU, its kernels interpreted: logits and ids against Hugging Face's, memory, launches, refusals.

The interpreter takes milliseconds for what a device does in a microsecond, so that models and passes are tiny here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import generate, ids
from support.engines import hugging_face as answers_of
from support.in_process import answered
from support.machine import needs_native
from support.models import save_model
from support.runs import RANDOM, ROOT, TINY, assert_refused, ran
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from support.triton_passes import SIZES, computed, dummy, hugging_face, prompts, settings_of
from triton.runtime import interpreter

from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.costs.memory import activation_bytes
from harness.costs.shape import ModelShape
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.triton import checks
from harness.engines.fastgen.runners.triton import runner as triton_runner
from harness.engines.fastgen.runners.triton.runner import TritonRunner
from harness.engines.known_model import KnownModel
from harness.engines.proof import proof
from harness.engines.shared.unusable import Unusable
from harness.models import made_up
from harness.models.source import Source
from harness.models.tensors import Checkpoint
from harness.workload.records import Request

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as a user would; tests/conftest.py has told Triton before


# --- it computes what Hugging Face computes -------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}),
    ("mistral", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80, "vocab_size": 257}),
    ("qwen2", {"num_attention_heads": 2, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
    ("qwen3", {"num_key_value_heads": 1, "head_dim": 96, "rms_norm_eps": 0.3}),
]
FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    ("qwen3", {"attention_bias": True, "num_attention_heads": 14, "num_key_value_heads": 2}),
]


def runner_for(directory: Path, dtype: str, **engine: Any) -> TritonRunner:
    runner = TritonRunner(settings_of(directory, dtype, **engine))
    known = KnownModel.of(runner.settings.source, dtype)
    assert checks.unsupported(known) is None
    runner.load()
    return runner


def compare(directory: Path, runner: TritonRunner, tokens: list[list[int]], logits: list[torch.Tensor]) -> None:
    """Asserts that logits are Hugging Face's: in float32 to the digit, else nearer than its own rounding, and a bit."""
    exact, dtype = hugging_face(directory, tokens), runner.dtype
    if dtype is torch.float32:
        for one, other in zip(logits, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        return
    theirs = torch.cat(hugging_face(directory, tokens, dtype))
    error, usual = ((found - torch.cat(exact)).norm(dim=-1).mean().item() for found in (torch.cat(logits), theirs))
    assert 0 < error < 1.25 * usual


@pytest.mark.parametrize(
    ("family", "more", "dtype"),
    [
        *((*model, "float32") for model in MODELS),
        (*MODELS[0], "bfloat16"),
        (*MODELS[3], "float16"),
        *(pytest.param(*model, "float32", marks=pytest.mark.slow) for model in FURTHER),
        *(pytest.param(*model, "bfloat16", marks=pytest.mark.slow) for model in (*MODELS[1:], *FURTHER)),
        *(pytest.param(*model, "float16", marks=pytest.mark.slow) for model in (*MODELS[:3], *FURTHER)),
    ],
    ids=str,
)
def test_logits_are_hugging_faces(tmp_path: Path, family: str, more: dict[str, Any], dtype: str) -> None:
    """Of chunks that begin, go on with and end prompts, decodes beside them and alone; over scattered blocks of NaN."""
    sizes = {**SIZES, **more}
    directory = save_model(tmp_path, family, getattr(torch, dtype), **sizes)
    runner = runner_for(directory, dtype)
    jobs = list(zip(prompts([18, 1, 4], sizes["vocab_size"]), [2, 3, 1], strict=True))
    tokens, logits = computed(runner, jobs, budget=8, blocks=6)
    assert [len(sequence) for sequence in tokens] == [20, 4, 5]
    compare(directory, runner, tokens, logits)


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draws the tokens of up to 64 prompts, 240 in all at most, and of their outputs."""
    count = draw(st.integers(1, 64))
    most = max(1, 240 // count)
    return draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, 2)), min_size=count, max_size=count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more", "dtype"),
    [*((*model, "float32") for model in MODELS), (*MODELS[0], "bfloat16"), (*MODELS[3], "float16")],
    ids=str,
)
def test_any_ragged_batch(
    tmp_path_factory: pytest.TempPathFactory, family: str, more: dict[str, Any], dtype: str
) -> None:
    """Over a cache in which the sequences do not all have room, so that some wait and some are computed twice."""
    sizes = {**SIZES, **more, "num_hidden_layers": 1}
    directory = save_model(tmp_path_factory.mktemp("model"), family, getattr(torch, dtype), **sizes)
    runner = runner_for(directory, dtype, token_budget=96, max_sequences=64)

    @settings(max_examples=3, database=None, suppress_health_check=list(HealthCheck))
    @given(spans(), st.sampled_from([7, 33, 96]), st.integers(0, 9))
    def check(drawn: list[tuple[int, int]], budget: int, seed: int) -> None:
        texts = prompts([length for length, _ in drawn], sizes["vocab_size"], seed)
        jobs = [(text, count) for text, (_, count) in zip(texts, drawn, strict=True)]
        tokens, logits = computed(runner, jobs, budget, blocks=17 + len(jobs) // 2, seed=seed)
        compare(directory, runner, tokens, logits)

    check()


# --- as an engine ---------------------------------------------------------------------------------------------------


def requests_of(lengths: list[int], outputs: list[int]) -> list[Request]:
    both = enumerate(zip(prompts(lengths), outputs, strict=True))
    return [Request(index, "", output_len=output, prompt_ids=tuple(text)) for index, (text, output) in both]


def test_ids_are_hugging_faces_every_time() -> None:
    """With a cache of three blocks, so that one is preempted of two sequences that need two each at their ends."""
    chosen = settings_of(dummy(num_hidden_layers=1), token_budget=12, max_sequences=2, kv_memory=3 * 16384)
    jobs = requests_of([14, 13, 1], [8, 5, 1])
    engine = FastGenEngine(chosen)
    engine.load()
    assert (engine.kernels, engine.total_blocks, engine.notes) == ("triton", 3, [checks.INTERPRETED])
    expected = answers_of(chosen.source, jobs)
    for depth in (0, 1):  # as on a device: passes are launched before the ids of those before have come
        engine.runner.depth = depth
        assert ids(generate(engine, jobs)) == expected
        assert engine.statistics.preemptions


@pytest.mark.slow
def test_it_is_warmed_up_and_proves_itself() -> None:
    chosen = settings_of(dummy(num_hidden_layers=1), stop=Stop.eos, token_budget=8, max_sequences=2)
    engine = FastGenEngine(dataclasses.replace(chosen, max_context=16))
    assert proof.load(engine) is engine
    assert engine.proof is not None and engine.proof["largest_distance"] < 1e-4
    engine.warm_up()
    jobs = requests_of([5], [3])
    assert ids(generate(engine, jobs)) == answers_of(engine.settings.source, jobs, eos=2)


@pytest.mark.slow
def test_ids_of_the_demo_model_are_hugging_faces(demo_model: Path) -> None:
    chosen = settings_of(demo_model, kv_memory="64MiB")
    engine = FastGenEngine(chosen)
    engine.load()
    texts = ["The capital of France is", "1, 2, 3,"]
    prompt_ids = engine.tokenizer(texts).input_ids
    jobs = [Request(place, "", output_len=4, prompt_ids=tuple(one)) for place, one in enumerate(prompt_ids)]
    assert ids(generate(engine, jobs)) == answers_of(chosen.source, jobs)


@pytest.mark.slow
def test_two_ranks_share_a_model_and_their_tokens_are_right(tmp_path: Path) -> None:
    """A run over gloo: loaded in parts, proven, verified against Hugging Face's ids."""
    model = [*TINY, "model.architecture.hidden_size=256", "model.architecture.vocab_size=301", "model.max_context=24"]
    work = ["dataset.num_samples=3", "dataset.input_len=9", "dataset.output_len=4", "engine.kv_block_size=16"]
    keys = ["engine=fastgen", "engine.kernels=triton", "engine.token_budget=8", "engine.max_sequences=4"]
    run = ran(tmp_path, *keys, *model, *RANDOM, *work, "parallel=tp2", "verify=3", TRITON_INTERPRET="1", cold=True)
    assert run.status == 0, run.stderr
    row = run.row
    assert (row["status"], row["kernels"], row["tp"], row["completed"]) == ("ok", "triton", "2", "3")
    assert (row["parity_checked"], float(row["parity_exact_share"])) == ("3", 1.0)


# --- what it takes --------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Counts what torch itself launches that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("t", "slice", "view", "alias", "detach", "transpose", "select", "split"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_pass_of_decodes_has_ten_launches_a_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    ours: list[str] = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: ours.append(self.fn.__name__)
    )
    for layers in (1, 2):
        runner = TritonRunner(settings_of(dummy(family, num_hidden_layers=layers)))
        runner.load()
        runner.make(8)
        chunks = [(Sequence(uid, [5] * 9, 9, 9, blocks=[uid], slot=uid), 8, 1, True) for uid in range(8)]
        ours.clear()
        with torch.inference_mode(), Counted() as theirs:
            plan = runner.planner.plan(RaggedBatch(chunks, 8, 0, [chunk[0] for chunk in chunks]))
            runner.decoder.choose(plan)
        counts.append(len(ours) + len(theirs.names))
    assert counts[1] - counts[0] <= 10
    assert counts[0] - (counts[1] - counts[0]) <= 4  # embedding, norm, output projection, the best


@pytest.mark.parametrize(("name", "tp"), [("llama2_7b", 1), ("llama2_13b", 1), ("llama2_70b", 8)])
def test_memory_is_what_was_planned(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, a KV cache of 8 GiB and activations, on a device that has only sizes."""
    monkeypatch.setattr(made_up, "draw", lambda *args, **kwargs: None)
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    engine = {"token_budget": 4096, "max_sequences": 512, "kv_block_size": 64}
    chosen = settings_of(Source("dummy", None, None, None, architecture, False), "bfloat16", **engine)
    runner = TritonRunner(dataclasses.replace(chosen, device="meta", max_context=4096))
    if tp > 1:
        runner.settings = dataclasses.replace(runner.settings, tensor=Place(tp))  # type: ignore[arg-type]
    checkpoint = Checkpoint(chosen.source)  # Hugging Face's model is on that device too
    monkeypatch.setattr(triton_runner, "Checkpoint", lambda source: checkpoint)
    with Allocated() as found:
        runner.load()
        shard = runner.shard
        blocks = (8 << 30) // (2 * shard.layers * shard.key_width * 64 * 2)
        runner.make(blocks)
    shape = ModelShape.of(architecture, "bfloat16")
    weights = (shape.matrix_bytes + shape.head_bytes) / tp + shape.other_bytes - shape.head_bytes
    planned = weights + (8 << 30) + activation_bytes(shape, 4096, 512, tp)
    assert abs(found.size / planned - 1) < 0.02


@dataclasses.dataclass
class Place:
    """The first of several ranks, of which no other is there."""

    size: int
    rank: int = 0
    group: Any = None


class Allocated(TorchDispatchMode):
    """Adds up what is allocated for good on the meta device."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "zeros") and found.device.type == "meta":
            self.size += found.numel() * found.element_size()
        return found


def test_passes_are_tried_before_the_cache_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, where they compile the kernels; their largest sizes, on a block that is given back."""
    runner = TritonRunner(settings_of(dummy(num_hidden_layers=1), token_budget=9, max_sequences=3))
    runner.load()
    tried: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: tried.append((self.fn.__name__, self.grid))
    )
    runner.try_passes()
    embedded = [grid[0] for name, grid in tried if name == "embed_kernel"]
    assert embedded == [9, 9, 3]

    def broken() -> None:
        raise RuntimeError("no compiler\nat all")

    with pytest.raises(Unusable, match=r"^engine\.kernels: triton: RuntimeError: no compiler at all; use engine"):
        runner._have(broken)


@needs_native
def test_kernels_that_cannot_be_built_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FastGenEngine):
        def load(self) -> None:
            raise Unusable(self.kernels, "no compiler")

    chosen = settings_of(dummy())
    auto = dataclasses.replace(chosen, engine=dataclasses.replace(chosen.engine, kernels=Kernels.auto))
    engine = proof.load(Broken(auto))
    assert engine.kernels == "torch"
    assert engine.notes[-1].endswith("took torch, not native: no compiler")
    with pytest.raises(Unusable, match=r"triton: no compiler; use engine.kernels=torch or auto$"):
        proof.load(Broken(chosen))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_on_a_cpu_it_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    done = answered("engine.kernels=triton", f"results_dir={tmp_path}")
    assert_refused(
        done,
        "error: engine.kernels: triton needs CUDA; tests/test_triton_runner.py has Triton interpret it on a CPU "
        "(TRITON_INTERPRET=1); use engine.kernels=native, torch or auto",
    )


LLAMA_70B = yaml.safe_load((ROOT / "conf" / "model" / "llama2_70b.yaml").read_text())["architecture"]


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"dtype": "float32"}, "they compute in float16 or bfloat16, not in float32"),
        ({"pickled": True}, "these weights are pickled (model.allow_pickle)"),
        ({"gguf": True}, "these weights are a GGUF file"),
        ({"model_type": "gemma2"}, "gemma2 is not one of the families that they compute (llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights are packed (quantization_config)"),
        ({"auto_map": {"AutoModel": "x.py"}, "remote_code": True}, "brings its own code (model.trust_remote_code)"),
        ({"head_dim": 72}, "its head size is 72, not one of 64, 80, 96, 128"),
        ({"num_key_value_heads": 5}, "64 query and 5 key-value heads"),
        ({"tp": 3}, "64 query and 8 key-value heads cannot be split over 3 ranks"),
        ({"tp": 12}, "64 query and 8 key-value heads cannot be split over 12 ranks"),
        ({"tp": 8, "intermediate_size": 28676}, "its intermediate_size 28676 cannot be split over 8 ranks"),
        ({"tp": 8, "vocab_size": 10}, "its vocab_size 10 cannot be split over 8 ranks"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "its rotary embedding is scaled (dynamic; default,"),
        ({"partial_rotary_factor": 0.75}, "only a part of each head is rotated (partial_rotary_factor)"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu, not silu"),
        ({"mlp_bias": True}, "it has mlp_bias"),
    ],
    ids=str,
)
def test_each_hazard_is_refused(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], found: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    given_to: dict[str, Any] = {"dtype": "bfloat16", "tp": 1, "remote_code": False, "pickled": False, "gguf": False}
    architecture = dict(LLAMA_70B)
    for key, value in more.items():
        (given_to if key in given_to else architecture)[key] = value
    reason = checks.unsupported(KnownModel(architecture, **given_to))
    assert reason is not None and found in reason and "\n" not in reason


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32, 64])
def test_the_largest_model_can_be_split(tp: int) -> None:
    assert checks.unsupported(KnownModel(LLAMA_70B, "bfloat16", tp)) is None


def test_a_window_within_the_context_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "mistral", torch.float32, **{**SIZES, "sliding_window": 32})
    with pytest.raises(UserError, match="mistral has attention that engine=fastgen does not compute"):
        TritonRunner(settings_of(directory)).load()


def test_logits_that_are_no_numbers_end_the_run() -> None:
    runner = TritonRunner(settings_of(dummy(num_hidden_layers=1)))
    runner.load()
    runner.make(1)
    runner.weights.norm.fill_(float("nan"))
    sequence = Sequence(0, [5], 1, 1, blocks=[0], slot=0)
    wait = runner.launch(RaggedBatch([(sequence, 0, 1, True)], 0, 1, [sequence]))
    with pytest.raises(FloatingPointError, match=r"^the model's logits are not numbers$"):
        wait()
