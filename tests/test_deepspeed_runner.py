"""DeepSpeed's ragged engine behind our runner, all of it but the CUDA kernels, on the CPU.

`deepspeed_kernels` stands in for the compiled extensions; engine, models, policies, containers, sharding, state
manager and allocators are DeepSpeed's own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import ragged
from support.deepspeed_kernels import CPU, emulate
from support.ragged import (
    ROUNDING,
    Judge,
    batch,
    chunk,
    gap_of,
    generate,
    loaded,
    requests,
    save,
    settings,
)
from support.runs import together

from harness.basics.errors import UserError
from harness.config.schema import GenerationConfig, Stop
from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.runners import deepspeed_model, deepspeed_runner
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner, engine_config
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared import ragged_kernels as checks
from harness.engines.shared.kv_blocks import KvBlocks
from harness.ranks.tensor_parallel import TensorParallel

kernels, tiny = ragged.kernels, ragged.tiny

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the engine computes what Hugging Face computes -----------------------------------------------------------------


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
    [
        (160, 8, 64, False),
        pytest.param(8, 8, 40, False, marks=pytest.mark.slow),
        pytest.param(700, 3, 20, False, marks=pytest.mark.slow),
        (300, 6, 5, True),
        pytest.param(100, 4, 3, True, marks=pytest.mark.slow),
    ],
)
def test_budgets_and_cache_sizes_do_not_change_a_token(
    kernels: None, tiny: Path, budget: int, sequences: int, blocks: int, preempts: bool
) -> None:
    runner = loaded(settings(tiny, token_budget=budget, max_sequences=sequences), blocks)
    jobs = requests(12, lengths=(1, 100, 110, 120, 124, 127, 128), most=40)
    found, engine = generate(runner, jobs, blocks)
    assert Judge(tiny).worst_gap(jobs, {i: c.token_ids for i, c in found.items()}) < ROUNDING["float16"]
    assert bool(engine.statistics.preemptions) is preempts


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
    monkeypatch.setattr(deepspeed_model, "_Rotary", lambda rotary, frequencies: rotary)
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

    for family, (_, model_class) in deepspeed_model.CLASSES.items():
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
    again[0].tokens[:] = chunk(2, 40, 0, 40)[0].tokens
    rows = runner.forward(batch(chunk(3, 130, 0, 50), again, chunk(5, 9, 0, 2)))
    assert rows.tolist() == whole.tolist()[1:]
    assert runner.forward(batch(chunk(3, 130, 50, 79))).shape == (0,)
    assert runner.forward(batch()).shape == (0,)
    # The same tokens in other chunks, in another pass, under another uid.
    one, two = chunk(3, 130, 129, 1), chunk(6, 130, 0, 130)
    two[0].tokens[:] = one[0].tokens
    assert len(set(runner.forward(batch(one, two)).tolist())) == 1


def test_slots_and_blocks_can_be_used_again(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny, token_budget=600))
    first = runner.forward(batch(chunk(1, 130, 0, 130)))
    assert runner.forward(batch(chunk(1, 130, 0, 60))).numel() == 0
    assert runner.forward(batch(chunk(1, 130, 0, 130))).equal(first)  # begun anew, the old half was not in the way
    other = chunk(2, 130, 0, 130)
    other[0].tokens[:] = chunk(1, 130, 0, 130)[0].tokens
    other[0].slot, other[0].blocks = 1, [60, 3]
    assert runner.forward(batch(other)).equal(first)


def test_tokens_without_a_block_are_never_computed(kernels: None, tiny: Path) -> None:
    runner = loaded(settings(tiny))
    short = chunk(3, 130, 60, 70)
    del short[0].blocks[1:]
    with pytest.raises(RuntimeError, match="sequence 3 has 1 blocks of 128 tokens, and 130 tokens"):
        runner.forward(batch(chunk(1, 20, 0, 20), short))


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
    assert sum(-(-length // checks.SMALLEST_ATOM) for length in lengths) <= manager.max_ragged_sequence_count


def test_no_attention_atom_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.inference.v2.kernels.ragged_ops import get_q_block_size

    sizes = set()
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        emulate(monkeypatch.setattr)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        sizes |= {get_q_block_size(head_dim) for head_dim in checks.HEAD_DIMS}
    assert min(sizes) == checks.SMALLEST_ATOM


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


@dataclasses.dataclass
class Seen:
    """What the kernels find of a pass: its buffers, and the blocks of each sequence behind their addresses."""

    ids: list[int]
    metadata: list[int]
    descriptors: list[list[int]]
    owners: list[int]
    blocks: list[list[int]]

    @classmethod
    def of(cls, found: Any, block_size: int) -> Seen:
        count, tokens = found.current_sequences, found.current_tokens
        descriptors = found.inflight_seq_descriptors().tolist()
        sizes = [-(-(size + before) // block_size) for _, size, before, _ in descriptors]
        blocks = [
            list((ctypes.c_int32 * size).from_address(place))
            for place, size in zip(found.kv_ptrs().tolist(), sizes, strict=True)
        ]
        assert len(descriptors) == count and found.input_ids().numel() == tokens
        owners = found.tokens_to_seq().tolist()
        return cls(found.input_ids().tolist(), found.batch_metadata_buffer().tolist(), descriptors, owners, blocks)


@pytest.fixture(scope="module")
def two_books(tiny: Path) -> Iterator[tuple[DeepSpeedRunner, DeepSpeedRunner, list[Seen]]]:
    """Returns two runners whose passes compute nothing, and where what the kernels would find is kept."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch.setattr)
        seen: list[Seen] = []
        runners = []
        for _ in range(2):
            runner = loaded(settings(tiny, token_budget=700, max_sequences=12, kv_memory="1GiB"))

            def forward(found: Any) -> torch.Tensor:
                seen.append(Seen.of(found, 128))
                return torch.zeros(found.current_sequences, 320)

            runner.policy.model.forward = forward
            runners.append(runner)
        yield runners[0], runners[1], seen


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_kernels_find_what_deepspeed_itself_would_write(
    two_books: tuple[DeepSpeedRunner, DeepSpeedRunner, list[Seen]], data: st.DataObject
) -> None:
    ours, theirs, seen = two_books
    total, sequences = data.draw(st.integers(4, 16)), data.draw(st.integers(1, 12))
    scheduler = Scheduler(data.draw(st.integers(sequences, 700)), sequences, KvBlocks(total, ours.block_size))
    assert ours.allocate(total) == theirs.allocate(total) == total
    for uid in range(data.draw(st.integers(1, 14))):
        prompt, output = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 30))
        scheduler.submit(Sequence(uid, [3 + (uid + place) % 300 for place in range(prompt)], prompt, output))
    while scheduler.unfinished:
        planned = scheduler.schedule()
        for sequence in scheduler.preempted:
            theirs.engine.flush(sequence.uid)
        seen.clear()
        rows = ours.forward(planned)
        ids = [torch.tensor(sequence.tokens[start:][:length]) for sequence, start, length, _ in planned.chunks]
        theirs.engine.put([sequence.uid for sequence, *_ in planned.chunks], ids, do_checks=False)
        mine, deepspeeds = seen
        held = [one[0].blocks[: len(blocks)] for one, blocks in zip(planned.chunks, mine.blocks, strict=True)]
        assert mine.blocks == held  # not DeepSpeed's numbers, but as many, and no one else's
        assert [len(blocks) for blocks in deepspeeds.blocks] == [len(blocks) for blocks in held]
        assert dataclasses.replace(mine, blocks=[]) == dataclasses.replace(deepspeeds, blocks=[])
        for sequence in scheduler.complete(planned, rows.tolist()):
            theirs.engine.flush(sequence.uid)


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


def rank_main(rank: int, port: int, out: str, directory: str) -> None:
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
    result: dict[str, Any] = {}
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
    Path(out).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_of_three_share_a_model(tiny: Path, tmp_path: Path) -> None:
    script = "import sys, test_deepspeed_runner as t; t.rank_main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"
    _, one, two = together(tmp_path, script, 3, str(tiny))
    assert one == two
    assert one["blocks"] == 16
    assert one["query"] == [(4 + 2) * 64, 512]
    jobs = requests(10)
    ids = {int(index): tokens for index, tokens in one["ids"].items()}
    assert Judge(tiny).worst_gap(jobs, ids) < ROUNDING["float16"]
