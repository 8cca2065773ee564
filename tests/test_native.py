"""The C++ forward pass: its logits and ids against Hugging Face's.

Models have random weights, biases and norms included; only so does each part of the pass show in the logits.
"""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from support.engines import generate, hugging_face, requests, settings, settings_of
from support.machine import needs_native
from support.models import SIZES, save_model
from torch import Tensor

from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.config import Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.runners.native import build, checks, library
from harness.engines.fastgen.runners.native_runner import NativeRunner
from harness.engines.known_model import KnownModel
from harness.engines.shared.order import Order

pytestmark = pytest.mark.usefixtures("one_thread")

# --- models and passes ----------------------------------------------------------------------------------------------


# What each pass feeds: sequence and tokens. The first comes in pieces, of which every height of tile up to 14 is one,
# goes on past the 256 keys that are scored together, and is joined by others: whole prompts and decodes.
PASSES: list[list[tuple[int, int]]] = [
    *([(0, length)] for length in range(1, 15)),
    [(0, 15), (1, 70)],
    [(1, 1), (0, 31), (2, 37)],
    [(1, 1), (2, 1), (0, 49)],
    [(2, 1), (1, 1), (0, 97), (3, 1)],
    *([[(0, 1), (1, 1), (2, 1), (3, 1)]] * 3),
]


def prompts(vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Returns the sequences' ids, as many as ``PASSES`` feeds."""
    rng = random.Random(seed)
    lengths = [sum(length for step in PASSES for uid, length in step if uid == which) for which in range(4)]
    assert lengths == [300, 76, 42, 4]
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


def logits_of(runner: NativeRunner, tokens: list[list[int]], seed: int = 0) -> list[Tensor]:
    """Feeds the sequences as ``PASSES`` says, their blocks in no order; returns the logits of all their tokens."""
    sequences = [Sequence(uid, ids, len(ids), 1) for uid, ids in enumerate(tokens)]
    needed = [-(-len(ids) // runner.block_size) for ids in tokens]
    total = sum(needed) + 5
    assert runner.allocate(total) == total
    runner.cache.array.fill(0x461C461C)  # about 10,000 in either type: what a former holder of the blocks left there
    numbers = list(range(total))
    random.Random(seed).shuffle(numbers)
    for sequence, count in zip(sequences, needed, strict=True):
        sequence.blocks = [numbers.pop() for _ in range(count)]
    found: list[list[Tensor]] = [[] for _ in tokens]
    for step in PASSES:
        chunks = []
        for uid, length in step:
            chunks.append((sequences[uid], sequences[uid].computed, length, True))
            sequences[uid].computed += length
        rows = sum(length for _, length in step)
        logits = torch.full((rows, runner.model.vocab), float("nan"))
        next_ids = runner._run(chunks, list(range(rows)), logits)
        assert next_ids.tolist() == logits.argmax(-1).tolist()
        last = [end - 1 for end in torch.tensor([length for _, length in step]).cumsum(0).tolist()]
        assert runner.forward(RaggedBatch(chunks, 0, rows)).tolist() == next_ids[last].tolist()
        for (uid, _), part in zip(step, logits.split([length for _, length in step]), strict=True):
            found[uid].append(part)
    return [torch.cat(parts) for parts in found]


@torch.inference_mode()
def hugging_face_logits(directory: Path, tokens: list[list[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in tokens]


@pytest.fixture(params=checks.INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set that this machine has, and may use."""
    fastest, names = checks.instruction_set(), list(checks.INSTRUCTION_SETS)
    if fastest is None or names.index(request.param) < names.index(fastest):
        pytest.skip(f"this processor has no {request.param}, or may not use it")
    monkeypatch.setenv("HARNESS_CPU_ISA", request.param)
    return str(request.param)


# In float32 those with AVX-512 differ in nothing.
IN_FLOAT32 = list(dict.fromkeys([checks.instruction_set("float32") or "avx2", "avx2"]))


# --- it computes what Hugging Face computes -------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.3}
GRANITE |= {"residual_multiplier": 0.22, "logits_scaling": 3.0}


@pytest.mark.parametrize("instructions", IN_FLOAT32, indirect=True)
@pytest.mark.parametrize(
    ("family", "more", "block_size"),
    [
        ("llama", {"tie_word_embeddings": True}, 16),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}, 64),
        ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 0.3}, 32),
        ("llama", {"num_key_value_heads": 1, "vocab_size": 257}, 128),
        ("mistral", {}, 256),
        ("mistral", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80, "vocab_size": 15}, 16),
        ("qwen2", {}, 48),
        ("qwen2", {"head_dim": 128, "num_attention_heads": 2, "vocab_size": 331}, 16),
        ("qwen3", {}, 96),
        ("qwen3", {"head_dim": 32, "num_key_value_heads": 3, "attention_bias": True, "rms_norm_eps": 0.3}, 80),
        ("llama", {"head_dim": 256, "num_attention_heads": 4}, 16),
        (
            "llama",
            {"hidden_size": 112, "intermediate_size": 176, "num_attention_heads": 7, "num_key_value_heads": 7},
            112,
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}, 16),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}}, 16),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}}, 160),
        ("granite", {"tie_word_embeddings": True, "attention_bias": True, **GRANITE}, 16),
        ("phi3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 112}, 16),
        ("olmo2", {"rms_norm_eps": 0.3, "attention_bias": True}, 64),
        ("olmo2", {"head_dim": 32, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 80}, 16),
        ("gemma", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}, 16),
        ("llama", {"hidden_act": "gelu_pytorch_tanh", **GRANITE}, 16),  # a Llama has no multipliers
    ],
    ids=str,
)
def test_logits_are_hugging_faces(
    instructions: str, tmp_path: Path, family: str, more: dict[str, Any], block_size: int
) -> None:
    """In passes of every kind, with one thread and with two, over scattered blocks that held something else."""
    directory = save_model(tmp_path, family, torch.float32, **{**SIZES, **more})
    chosen = settings_of(directory, stop=Stop.eos, kv_block_size=block_size, kv_memory="64MiB")
    assert checks.unsupported(KnownModel(chosen.source.architecture, "float32", 1)) is None
    runner = NativeRunner(chosen)
    runner.load()
    assert (runner.block_size, runner.stop_ids()) == (block_size, {2})
    cores = os.sched_getaffinity(0)
    tokens = prompts(runner.model.vocab)
    expected = hugging_face_logits(directory, tokens)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = logits_of(runner, tokens, seed=threads)
        finally:
            torch.set_num_threads(1)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    assert os.sched_getaffinity(0) == cores  # a pass keeps its threads on cores of their own, and lets go of ours


@pytest.mark.parametrize("threads", [3, 64, 128])
def test_any_number_of_threads_gives_the_same_logits(instructions: str, tmp_path: Path, threads: int) -> None:
    """To the last bit: with more threads than cores, and than a product has panels, and packed by others than read."""
    directory = save_model(tmp_path, "llama", torch.bfloat16, **{**SIZES, "vocab_size": 2100})
    runner = NativeRunner(settings_of(directory, "bfloat16", kv_block_size=16, kv_memory="64MiB"))
    tokens = prompts(2100)
    found = []
    for packing, computing in ((1, 1), (threads, threads), (threads, 2)):
        torch.set_num_threads(packing)
        try:
            runner.load()
            torch.set_num_threads(computing)
            found.append(torch.cat(logits_of(runner, tokens)))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_many_activations_add_up_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    """To the last bit: in groups of panels and pieces of their depth, which are not whole ones."""
    more = {"hidden_size": 624, "intermediate_size": 1072, "vocab_size": 1100}
    directory = save_model(tmp_path, "llama", torch.float32, **{**SIZES, **more})
    found = []
    for compiler in ("g++", "g++ -DHARNESS_MANY_BYTES=4096"):
        monkeypatch.setenv("CXX", compiler)
        runner = NativeRunner(settings_of(directory, dtype, kv_block_size=16, kv_memory="64MiB"))
        runner.load()
        parts = logits_of(runner, prompts(1100))
        long = Sequence(0, prompts(1100, seed=1)[0], 300, 1)
        long.blocks = list(range(-(-300 // runner.block_size)))
        found.append(torch.cat([*parts, runner.logits(RaggedBatch([(long, 0, 300, True)], 0, 300), list(range(300)))]))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi3", "olmo2", "gemma"])
def test_bfloat16_is_as_close_to_float32_as_hugging_faces(instructions: str, tmp_path: Path, family: str) -> None:
    more = {"hidden_size": 384, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    more |= GRANITE if family == "granite" else {}
    directory = save_model(tmp_path, family, torch.bfloat16, **{**SIZES, **more})
    runner = NativeRunner(settings_of(directory, "bfloat16", kv_block_size=16, kv_memory="64MiB"))
    runner.load()
    tokens = prompts(runner.model.vocab)
    exact = torch.cat(hugging_face_logits(directory, tokens))
    theirs = torch.cat(hugging_face_logits(directory, tokens, torch.bfloat16))
    ours = torch.cat(logits_of(runner, tokens))
    error, usual = ((logits - exact).norm(dim=-1).mean().item() for logits in (ours, theirs))
    assert 0 < error < 1.1 * usual  # measured: half of it


@needs_native
@pytest.mark.slow
def test_a_library_that_is_compiled_for_it_takes_the_time_of_each_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = save_model(tmp_path, "llama", torch.float32, **SIZES)
    for timed in (False, True):
        monkeypatch.setenv(build.STAGES, "1" if timed else "")
        runner = NativeRunner(settings_of(directory, "float32", kv_block_size=16, kv_memory="64MiB"))
        runner.load()
        logits_of(runner, prompts(runner.model.vocab))
        assert [seconds > 0 for seconds in runner.stages().values()] == [timed] * len(library.STAGES)


@needs_native
def test_the_cache_is_there_before_the_clock_as_far_as_the_run_fills_it(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama", torch.float32, **SIZES)
    taken = {}
    for share in (0.0, 0.5):
        given = settings_of(directory, "float32", kv_block_size=16, kv_memory="256MiB")
        runner = NativeRunner(given)
        runner.load()
        blocks = runner.allocate(1 << 20)
        runner.settings = dataclasses.replace(runner.settings, held_tokens=int(share * blocks * runner.block_size))
        before = psutil.Process().memory_info().rss
        assert runner.allocate(1 << 20) == blocks
        taken[share] = psutil.Process().memory_info().rss - before
    assert 100 << 20 < taken[0.5] - taken[0.0] < 160 << 20


REQUESTS = requests(30)
BLOCK = 2 * 3 * 2 * 16 * 16 * 4  # bytes, with test_fastgen_engine's model; the longest request needs 12 blocks


@pytest.fixture(scope="module")
def answers() -> dict[int, list[int]]:
    return hugging_face(settings().source, REQUESTS)


@needs_native
@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(("budget", "sequences", "blocks"), [(5, 5, 13), (64, 40, 12), (300, 64, 300)])
def test_budgets_and_cache_sizes_do_not_change_a_token(
    answers: dict[int, list[int]], budget: int, sequences: int, blocks: int, order: Order
) -> None:
    engine = FastGenEngine(
        settings(
            kernels=Kernels.native,
            token_budget=budget,
            max_sequences=sequences,
            kv_block_size=16,
            kv_memory=blocks * BLOCK,
            order=order,
        )
    )
    engine.load()
    assert (engine.kernels, engine.total_blocks, engine.notes) == ("native", blocks, [])
    engine.warm_up()
    found = generate(engine, REQUESTS)
    assert {index: completion.token_ids for index, completion in found.items()} == answers
    if blocks == 12 and order is Order.longest_first:
        assert engine.statistics.preemptions


@needs_native
@pytest.mark.parametrize(
    ("wish", "size"), [(1, 16), (16, 16), (17, 32), (200, 208), (250, 256), (256, 256), (257, 256), (100_000, 256)]
)
def test_blocks_are_a_multiple_of_16_tokens_up_to_256(wish: int, size: int) -> None:
    engine = FastGenEngine(settings(kernels=Kernels.native, kv_block_size=wish, kv_memory="1MiB"))
    engine.load()
    assert engine.runner.block_size == size
    assert engine.notes == (
        [] if wish == size else [f"the kernels' KV blocks are of {size} tokens, not engine.kv_block_size"]
    )


@needs_native
@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (100, r"^engine\.kv_memory: 100 is 100 bytes, less than one block of 64 tokens"),
        ("100000GiB", r"^engine\.kv_memory: 100000GiB asks for 100000\.0 GiB, .* are free"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(memory: int | str, line: str) -> None:
    chosen = settings(
        kernels=Kernels.native, kv_memory=memory, kv_block_size=64, max_sequences=2**29, token_budget=2**29
    )
    engine = FastGenEngine(chosen)
    with pytest.raises(UserError, match=line):
        engine.load()


# --- models that come out wrong -------------------------------------------------------------------------------------


@needs_native
def test_a_token_that_the_model_does_not_know_ends_the_run(tmp_path: Path) -> None:
    runner = NativeRunner(settings_of(save_model(tmp_path, "llama", torch.float32, **SIZES)))
    runner.load()
    runner.allocate(1)
    stranger = Sequence(0, [5, SIZES["vocab_size"]], 2, 1, blocks=[0])
    with pytest.raises(IndexError, match=r"^token id 300 is outside the model's vocabulary of 300$"):
        runner.forward(RaggedBatch([(stranger, 0, 2, True)], 0, 2))
