"""DeepSpeed's ragged engine behind our runner, all of it but the CUDA kernels, on the CPU.

`deepspeed_kernels` stands in for the compiled extensions; engine, models, policies, containers, sharding, state
manager and allocators are DeepSpeed's own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.deepspeed_kernels import CPU, emulate
from support.ragged import TINY, Judge, batch, chunk, float_quantize, gap_of, generate, loaded, requests, save, settings
from support.runs import ROOT, variables
from torch import Tensor

from harness.basics.errors import UserError
from harness.config.schema import GenerationConfig, Stop
from harness.engines.fastgen.runners import deepspeed_runner
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner, engine_config
from harness.engines.fastgen.runners.deepspeed_weights import Weights
from harness.engines.fastgen.scheduler import Scheduler, Sequence
from harness.engines.shared import ragged_kernels as checks
from harness.engines.shared.kv_blocks import KvBlocks
from harness.models.directory import find
from harness.models.source import Source
from harness.ranks.tensor_parallel import TensorParallel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch.setattr)


# --- models and requests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


# --- the engine computes what Hugging Face computes -----------------------------------------------------------------

ROUNDING = {"float16": 0.01, "bfloat16": 0.08}  # of the logits' standard deviation; a wrong token is off by 1 to 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", checks.FAMILIES)
def test_every_family_gives_hugging_faces_tokens(kernels: None, tmp_path: Path, family: str, dtype: str) -> None:
    directory = save(tmp_path, family, getattr(torch, dtype))
    runner = loaded(settings(directory, dtype))
    (cache,) = runner.engine._state_manager._kv_cache._caches
    assert cache.dtype is getattr(torch, dtype)  # qwen_v2 of itself always takes float16
    assert gap_of(runner, Judge(directory), requests(12)) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"hidden_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6},  # heads of 128: blocks of 64
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ],
    ids=str,
)
def test_every_shape_gives_hugging_faces_tokens(kernels: None, tmp_path: Path, more: dict[str, Any]) -> None:
    directory = save(tmp_path, **more)
    block_size = 128 if more.get("hidden_size") != 768 else 64
    runner = loaded(settings(directory, kv_block_size=block_size))
    assert runner.block_size == block_size
    assert gap_of(runner, Judge(directory), requests(8)) < ROUNDING["float16"]


@pytest.mark.parametrize(
    ("budget", "sequences", "blocks", "preempts"),
    [(160, 8, 64, False), (8, 8, 40, False), (700, 3, 20, False), (300, 6, 5, True), (100, 4, 3, True)],
)
def test_budgets_and_cache_sizes_do_not_change_a_token(
    kernels: None, tiny: Path, budget: int, sequences: int, blocks: int, preempts: bool
) -> None:
    runner = loaded(settings(tiny, token_budget=budget, max_sequences=sequences), blocks)
    jobs = requests(12, lengths=(1, 100, 110, 120, 124, 127, 128), most=40)
    found, engine = generate(runner, jobs, blocks)
    assert Judge(tiny).worst_gap(jobs, {i: c.token_ids for i, c in found.items()}) < ROUNDING["float16"]
    assert bool(engine.statistics.preemptions) is preempts
    assert runner.engine.free_blocks == [blocks] and not runner.fed


def test_a_wrong_epsilon_would_show(kernels: None, tmp_path: Path) -> None:
    runner = loaded(settings(save(tmp_path, rms_norm_eps=0.3)))
    model = runner.policy.model
    for kernel in (model.norm._fp_rms, model.norm._fp_rms_pre, model.unembed._norm):
        assert kernel.epsilon == 0.3
        kernel.epsilon = 1e-5  # DeepSpeed's own
    assert gap_of(runner, Judge(tmp_path), requests(6)) > 1.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deepspeeds_own_rotary_embedding_is_the_larger_error(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    directory = save(tmp_path, dtype=getattr(torch, dtype), sharp=2.0)
    ids = torch.randint(3, 320, (1800,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = Judge(directory).model(ids[None]).logits[0, -1]

    def error() -> float:
        runner = loaded(settings(directory, dtype, token_budget=1800))
        runner.engine.put([0], [ids[:-1]], do_checks=False)
        found = runner.engine.put([0], [ids[-1:]], do_checks=False)[0].float()
        return float((found - logits).abs().mean() / logits.std())

    ours = error()
    monkeypatch.setattr(deepspeed_runner, "_Rotary", lambda rotary, frequencies: rotary)
    assert error() > 4 * ours


def test_generation_ends_at_the_checkpoints_stop_ids(kernels: None, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 9]}))
    chosen = settings(tmp_path)
    assert loaded(chosen).stop_ids() == frozenset()
    runner = DeepSpeedRunner(dataclasses.replace(chosen, generation=GenerationConfig(stop=Stop.eos)))
    runner.load()
    assert runner.stop_ids() == {2, 7, 9}
    (tmp_path / "generation_config.json").unlink()
    runner.load()  # the weights anew
    assert runner.stop_ids() == {2}
    runner = DeepSpeedRunner(dataclasses.replace(settings(None), generation=GenerationConfig(stop=Stop.eos)))
    runner.load()
    assert runner.stop_ids() == {2}


def test_every_attribute_that_deepspeed_reads_is_in_the_config(kernels: None, tmp_path: Path) -> None:
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase

    for family, (_, model_class) in deepspeed_runner.CLASSES.items():
        runner = loaded(settings(save(tmp_path / family, family)))
        config = runner.policy.model._config
        source = inspect.getsource(model_class) + inspect.getsource(DSTransformerModelBase)
        read = set(re.findall(r"self\._config\.(\w+)", source))
        assert {"max_seq_length", "hidden_size", "num_key_value_heads"} <= read
        assert [name for name in sorted(read) if not hasattr(config, name)] == []
        assert config.max_seq_length == 2048
        # Nothing is left to an abstract or half-defined property.
        for name, value in inspect.getmembers(type(runner.policy.model), lambda member: isinstance(member, property)):
            if name != "flattened_params":
                assert getattr(runner.policy.model, name) is not None or value.fget is None or name.startswith("flat")


# --- driving the engine ---------------------------------------------------------------------------------------------


def test_only_last_chunks_have_a_row(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny, token_budget=600))
    whole = runner.forward(batch(chunk(1, 130, 0, 130), chunk(2, 40, 0, 40)))
    assert whole.shape == (2,) and whole.dtype is torch.int64 and whole.device == CPU
    again = chunk(4, 40, 0, 40)
    again.sequence.tokens[:] = chunk(2, 40, 0, 40).sequence.tokens
    rows = runner.forward(batch(chunk(3, 130, 0, 50), again, chunk(5, 9, 0, 2)))
    assert rows.tolist() == whole.tolist()[1:]
    assert runner.forward(batch(chunk(3, 130, 50, 79))).shape == (0,)
    assert runner.forward(batch()).shape == (0,)
    # The same tokens in other chunks, in another pass, under another uid.
    one, two = chunk(3, 130, 129, 1), chunk(6, 130, 0, 130)
    two.sequence.tokens[:] = one.sequence.tokens
    assert len(set(runner.forward(batch(one, two)).tolist())) == 1


def test_uids_can_be_used_again(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny, token_budget=600))
    first = runner.forward(batch(chunk(1, 130, 0, 130)))
    runner.free(chunk(1, 1, 0, 1).sequence)
    runner.free(chunk(1, 1, 0, 1).sequence)  # and one that it does not know is left alone
    assert runner.engine.free_blocks == [64]
    assert runner.forward(batch(chunk(1, 130, 0, 60))).numel() == 0
    assert runner.forward(batch(chunk(1, 130, 0, 130))).equal(first)  # begun anew, the old half was not in the way
    assert runner.engine.free_blocks == [62]
    assert runner.engine._state_manager.get_sequence(1).seen_tokens == 130


def test_a_sequence_that_was_freed_cannot_go_on(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny))
    runner.forward(batch(chunk(1, 130, 0, 60)))
    with pytest.raises(RuntimeError, match="fed 60 tokens, the chunk begins at 59"):
        runner.forward(batch(chunk(1, 130, 59, 70)))
    runner.free(chunk(1, 1, 0, 1).sequence)
    with pytest.raises(RuntimeError, match="fed 0 tokens, the chunk begins at 60"):
        runner.forward(batch(chunk(1, 130, 60, 70)))


def test_long_prompts_have_room_for_their_attention_atoms(
    kernels: None, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = requests(2, lengths=(1500,))
    chosen = settings(tiny, token_budget=1600, max_sequences=2)
    assert gap_of(loaded(chosen), Judge(tiny), jobs) < ROUNDING["float16"]
    config = engine_config(chosen)
    config.state_manager.max_ragged_sequence_count = 2
    monkeypatch.setattr(deepspeed_runner, "engine_config", lambda chosen: config)
    with pytest.raises(IndexError):  # a write past the end of the buffer, in C++
        generate(loaded(chosen), jobs, 64)


@given(st.integers(1, 3000), st.data())
def test_atoms_of_any_pass_fit(budget: int, data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, budget))
    manager = engine_config(settings(None, token_budget=budget, max_sequences=sequences)).state_manager
    assert manager.max_ragged_batch_size == budget
    assert sequences <= manager.max_ragged_sequence_count <= manager.max_tracked_sequences
    lengths, left = [], budget
    while left and len(lengths) < sequences:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    assert sum(-(-length // deepspeed_runner.SMALLEST_ATOM) for length in lengths) <= manager.max_ragged_sequence_count


def test_no_attention_atom_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.inference.v2.kernels.ragged_ops import get_q_block_size

    sizes = set()
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        emulate(monkeypatch.setattr)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        sizes |= {get_q_block_size(head_dim) for head_dim in checks.HEAD_DIMS}
    assert min(sizes) == deepspeed_runner.SMALLEST_ATOM


def test_settings_become_deepspeeds() -> None:
    chosen = settings(None, token_budget=4096, max_sequences=256, quantization="wf6af16")
    config = engine_config(dataclasses.replace(chosen, tensor=TensorParallel(1, 4, 0, None, None), max_context=777))
    assert config.tensor_parallel.tp_size == 4
    assert config.quantization.quantization_mode == "wf6af16"
    assert config.state_manager.max_context == 777
    assert config.state_manager.max_ragged_sequence_count == 256 + 64
    assert config.state_manager.memory_config.mode == "allocate"
    assert engine_config(settings(None)).quantization.quantization_mode is None
    with pytest.raises(UserError, match=r"^engine\.token_budget: 32769 is more .*; use at most 32768"):
        engine_config(settings(None, token_budget=32769))


# --- blocks and memory ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bookkeeper(tiny: Path) -> Iterator[DeepSpeedRunner]:
    """Returns a runner whose passes compute nothing: DeepSpeed's books, not its arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch.setattr)
        runner = loaded(settings(tiny, token_budget=700, max_sequences=12, kv_memory="1GiB"))
        runner.policy.model.forward = lambda batch: torch.zeros(batch.current_sequences, 320)
        yield runner


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_deepspeed_never_needs_a_block_that_the_scheduler_has_not_given(
    bookkeeper: DeepSpeedRunner, data: st.DataObject
) -> None:
    runner = bookkeeper
    total = data.draw(st.integers(4, 16))
    sequences = data.draw(st.integers(1, 12))
    scheduler = Scheduler(data.draw(st.integers(sequences, 700)), sequences, KvBlocks(total, runner.block_size))
    runner.fed.clear()
    assert runner.allocate(total) == total
    state = runner.engine._state_manager
    for uid in range(data.draw(st.integers(1, 14))):
        prompt, output = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 60))
        scheduler.submit(Sequence(uid, [5] * prompt, prompt, output))
    while scheduler.unfinished:
        planned = scheduler.schedule()
        for sequence in scheduler.preempted:
            runner.free(sequence)
        granted = {one.sequence.uid: len(one.sequence.blocks) for one in planned.chunks}
        rows = runner.forward(planned)
        for one in planned.chunks:
            held = state.get_sequence(one.sequence.uid)
            assert held.seen_tokens == one.start + one.length
            # Enough for its tokens (with too few free, DeepSpeed would silently take fewer), and no more than granted.
            assert held.cur_allocated_blocks == -(-held.seen_tokens // runner.block_size) <= granted[one.sequence.uid]
        assert runner.engine.free_blocks[0] >= scheduler.blocks.free
        for sequence in scheduler.complete(planned, rows.tolist()):
            runner.free(sequence)
    assert runner.engine.free_blocks == [total] and state.n_tracked_sequences == 0


def test_the_cache_takes_the_memory_it_was_given(kernels: None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = DeepSpeedRunner(settings(tiny, kv_memory="8MiB"))
    runner.load()
    assert runner.allocate(10**6) == 64
    (cache,) = runner.engine._state_manager._kv_cache._caches
    assert cache.shape == (2, 64, 128, 2, 2, 64) and cache.nbytes == 8 * 2**20
    assert runner.allocate(5) == 5
    # The rotary kernel counts a layer's elements in int32.
    monkeypatch.setattr(deepspeed_runner, "INDEXABLE", 10 * cache[0, 0].numel())
    assert runner.allocate(10**6) == 10


@pytest.mark.parametrize(
    ("memory", "found"),
    [("100KiB", "less than one block of 128 tokens \\(131072 bytes\\)"), ("900GiB", "asks for 900.0 GiB, .* are free")],
)
def test_impossible_kv_memory_is_refused(
    kernels: None, tiny: Path, monkeypatch: pytest.MonkeyPatch, memory: str, found: str
) -> None:
    monkeypatch.setattr(deepspeed_runner, "INDEXABLE", 2**60)
    runner = DeepSpeedRunner(settings(tiny, kv_memory=memory))
    runner.load()
    with pytest.raises(UserError, match=rf"^engine\.kv_memory: .*{found}"):
        runner.allocate(10**9)


# --- tensor parallelism ---------------------------------------------------------------------------------------------


def rank_main(rank: int, port: int, directory: str, out: str) -> None:
    """One of three processes: 1 and 2 share a model, as in a launch of several replicas; 0 has nothing to do."""
    import deepspeed
    import deepspeed.comm as dist
    import deepspeed.ops

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    group, messages = (torch.distributed.new_group([1, 2]) for _ in range(2))
    if rank:
        emulate(setattr)
        gather = dist.all_gather_into_tensor  # gloo wants the ranks' parts one after the other, NCCL takes any shape
        dist.all_gather_into_tensor = lambda all, one, group: gather(all.view(-1, one.shape[1]), one, group=group)
        tensor = TensorParallel(rank - 1, 2, 1, group, messages)
        memory = "4MiB" if rank == 1 else "1MiB"  # of half the heads: 64 and 16 blocks
        runner = DeepSpeedRunner(dataclasses.replace(settings(Path(directory), kv_memory=memory), tensor=tensor))
        runner.load()
        blocks = runner.allocate(1000)
        found, engine = generate(runner, requests(10), blocks)
        result = {
            "blocks": blocks,
            "query": list(runner.policy.model._transformer[0].qkv_w.shape),
            "preemptions": engine.statistics.preemptions,
            "ids": {index: completion.token_ids for index, completion in found.items()},
        }
        Path(out, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_of_three_share_a_model(tiny: Path, tmp_path: Path) -> None:
    from harness.ranks.rank import free_port

    port = free_port()
    code = "import sys, test_deepspeed_runner as t; t.rank_main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"
    environment = variables(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port), str(tiny), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (1, 2))
    assert one == two
    assert one["blocks"] == 16
    assert one["query"] == [(4 + 2) * 64, 512]
    jobs = requests(10)
    ids = {int(index): tokens for index, tokens in one["ids"].items()}
    assert Judge(tiny).worst_gap(jobs, ids) < ROUNDING["float16"]


# --- weights --------------------------------------------------------------------------------------------------------


def read(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = list(Weights(source, dtype, CPU, CPU).parameters())
    assert len(dict(weights)) == len(weights)
    return dict(weights)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_directorys_shards_are_read_whole(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    save(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    # What older checkpoints hold besides: rotary frequencies, and a head of their own that tying overrides.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    if tied:
        extra["lm_head.weight"] = torch.ones(320, 512)
    save_file(load_file(shards[0]) | extra, shards[0], {"format": "pt"})
    found = read(find(str(tmp_path), False, need_weights=True), torch.float16)
    assert_same(found, model.state_dict())
    assert (found["lm_head.weight"] is found["model.embed_tokens.weight"]) is tied


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    from support.checkpoints import write_gguf

    from harness.models import loading

    source = find(str(write_gguf(tmp_path / "tiny.gguf")), False, need_weights=True)
    weights = Weights(source, torch.float32, CPU, CPU)
    found = dict(weights.parameters())
    assert_same(found, loading.load_model(source, dtype=torch.float32).state_dict())
    assert not weights.state
    assert {parameter.device.type for parameter in weights.model.parameters()} == {"meta"}


def test_dummy_weights_depend_on_their_names_alone() -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    source = Source(
        "dummy", None, None, None, {"model_type": "qwen2", **TINY, "quantization_config": {"bits": 4}}, False
    )
    found = read(source, torch.bfloat16)
    expected = AutoModelForCausalLM.from_config(Qwen2Config(**TINY)).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_same(read(source, torch.bfloat16), found)
    layers = [found[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in (0, 1)]
    assert not layers[0].equal(layers[1])
    assert 0.019 < float(layers[0].float().std()) < 0.021
    assert found["model.norm.weight"].eq(1).all()
    assert found["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    tied = read(Source("dummy", None, None, None, {"model_type": "llama", **TINY, "tie_word_embeddings": True}, False))
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]


def test_dummy_weights_run(kernels: None) -> None:
    found, _ = generate(loaded(settings(None, "bfloat16")), requests(6), 64)
    assert all(completion.output_tokens == len(completion.token_ids) for completion in found.values())


def test_weights_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, words in (
        ({n: t for n, t in weights.items() if n != name}, f"lacks weights: 1, for example {name}"),
        (weights | {name: torch.ones(3, 512)}, f"of another shape than its config says: 1, for example {name}"),
        (weights | {"model.layers.2.x": torch.ones(3)}, "no place for: 1, for example model.layers.2.x"),
    ):
        shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"^model\.path: .*{re.escape(words)}"):
            read(find(str(tmp_path), False, need_weights=True))


def test_pickles_are_never_read(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor its index"):
        read(Source("directory", str(tmp_path), None, None, {}, False))


def test_packed_weights_move_with_all_their_parts() -> None:
    from deepspeed.inference.v2.inference_parameter import InferenceParameter

    packed = InferenceParameter.initialize(torch.ones(4, dtype=torch.uint8), scales=torch.ones(2, dtype=torch.float16))
    moved = packed.to("meta")
    assert isinstance(moved, InferenceParameter)
    assert moved.device.type == moved.scales.device.type == "meta"


def test_fp6_weights_are_packed_on_the_host_and_used(
    kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.inference.v2.modules.implementations.linear import fp_quantize

    monkeypatch.setitem(sys.modules, "qtorch", types.ModuleType("qtorch"))
    monkeypatch.setitem(sys.modules, "qtorch.quant", types.SimpleNamespace(float_quantize=float_quantize))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=8))
    directory = save(tmp_path, dtype=torch.bfloat16)  # the packing takes float16 and does not convert
    judge = Judge(directory)
    jobs = requests(8)
    runner = loaded(settings(directory, quantization="wf6af16"))
    packed = runner.policy.model._transformer[0].qkv_w
    assert packed.dtype is torch.uint8 and packed.scales.shape == (768, 1)
    found, _ = generate(runner, jobs, 64)
    ids = {index: completion.token_ids for index, completion in found.items()}
    assert judge.worst_gap(jobs, ids) > 0.1  # six bits are not sixteen
    for name, weight in judge.model.named_parameters():
        if "proj" in name:
            values, scales = fp_quantize(weight.data.half())
            weight.data = values.float() * scales.float()
    assert judge.worst_gap(jobs, ids) < ROUNDING["float16"]


@pytest.mark.parametrize(("quantization", "place"), [(None, "cuda:3"), ("wf6af16", "cpu")])
def test_only_weights_to_be_packed_stay_on_the_host(
    kernels: None, monkeypatch: pytest.MonkeyPatch, quantization: str | None, place: str
) -> None:
    asked: list[Any] = []

    def weights(*arguments: Any) -> None:
        asked.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr(deepspeed_runner, "Weights", weights)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    chosen = dataclasses.replace(settings(None, quantization=quantization), device="cuda:3")
    with pytest.raises(InterruptedError):
        DeepSpeedRunner(chosen).load()
    device = torch.device("cuda:3")
    assert asked == [device, chosen.source, torch.float16, device, torch.device(place)]


# --- what is refused ------------------------------------------------------------------------------------------------

LLAMA_7B = yaml.safe_load((ROOT / "conf" / "model" / "llama2_7b.yaml").read_text())["architecture"]


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama2_7b", "llama2_13b", "llama2_70b"])
def test_the_challenges_models_are_supported(name: str, tp: int, dtype: str) -> None:
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    assert checks.unsupported(architecture, dtype, tp, None, 4096) is None


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
    reason = checks.unsupported(architecture, max_context=None, **given_to)
    assert reason is not None and found in reason and "\n" not in reason


def test_harmless_settings_are_not_refused() -> None:
    for more in (
        {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        {"rms_norm_eps": 0.1, "tie_word_embeddings": True},
    ):
        assert checks.unsupported({**LLAMA_7B, **more}, "bfloat16", 1) is None
    packed = {**LLAMA_7B, "quantization_config": {"quant_method": "awq"}, "auto_map": {"AutoModel": "x.py"}}
    assert checks.unsupported(packed, "float16", 1, dummy=True) is None
    window = {**LLAMA_7B, "model_type": "mistral", "sliding_window": 1024}
    assert checks.unsupported(window, "float16", 1, max_context=1024) is None
    assert checks.unsupported(LLAMA_7B, "float16", 2, "wf6af16") is None
    assert checks.unsupported({}, "float16", 1) == "its config is not known before it is downloaded"


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
