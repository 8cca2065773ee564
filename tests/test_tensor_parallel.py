"""Ranks that share a model: groups of real processes over gloo, AutoTP's shards against the whole model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.in_process import answered
from support.runs import RANDOM, ROOT, TINY, assert_refused, launched, ran, ranks_of, start, variables

from harness.engines.shared.auto_tp_families import AUTO_TP_FAMILIES
from harness.results.completions import read_completions
from harness.results.directory import read_record
from harness.results.table import read_rows

HEAD = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from types import SimpleNamespace
import torch
import torch.distributed as dist
from harness.ranks import rank as ranks
from harness.ranks.rendezvous import Rendezvous
from harness.ranks.replicas import Replicas
place = sys.argv[-1]
rank = ranks.current()
rendezvous = Rendezvous(rank, failed=lambda: None)
rendezvous.open()
rendezvous.meet({})
"""

GROUPS = (
    HEAD
    + """
replicas = Replicas(rank, "cpu", rendezvous, tp=2)
replicas.join()
tensor = replicas.tensor
value = torch.tensor([10.0 ** rank.rank])
dist.all_reduce(value, group=tensor.group)
mine = {
    "sum": value.item(),
    "place": [tensor.rank, tensor.size, tensor.leader, tensor.leads],
    "shared": tensor.share(["from", rank.rank] if tensor.leads else None),
    "least": tensor.least(100 - rank.rank),
}
everyone = [None] * rank.world
dist.all_gather_object(everyone, mine)
if rank.first:
    open(place, "w").write(json.dumps(everyone))
replicas.leave()
"""
)

FAMILIES = (
    HEAD
    + """
import transformers
from harness.engines.shared.auto_tp_families import AUTO_TP_FAMILIES
from harness.engines.shared.auto_tp import init_inference
from harness.engines.shared.packed_linear import can_pack, pack_linears
transformers.logging.set_verbosity_error()
replicas = Replicas(rank, "cpu", rendezvous, tp=rank.world)
replicas.join()
sizes = dict(hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
             vocab_size=300, max_position_embeddings=128, pad_token_id=0)
ids = torch.arange(3, 40)[None]
differences = {}
for family in AUTO_TP_FAMILIES:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.inference_mode():
            whole = model(ids).logits.float()
            settings = SimpleNamespace(tensor=replicas.tensor, dtype=str(dtype).removeprefix("torch."))
            shard = init_inference(model, settings).module
            packed = pack_linears(shard) if can_pack(torch.device("cpu"), dtype) else 0
            difference = (whole - shard(ids).logits.float()).abs().max() / whole.abs().max()
        differences[f"{family} {settings.dtype}"] = [difference.item(), packed]
if rank.first:
    open(place, "w").write(json.dumps(differences))
replicas.leave()
"""
)


def test_two_ranks_share_a_model_and_their_tokens_are_right(tmp_path: Path) -> None:
    work = ["dataset.num_samples=4", "dataset.input_len=24", "dataset.output_len=6", "engine.kernels=torch"]
    run = ran(tmp_path, "engine=fastgen", *TINY, *RANDOM, *work, "parallel=tp2", "verify=4", cold=True)
    assert run.status == 0, run.stderr
    row = run.row
    assert (row["status"], row["tp"], row["dp"], row["completed"]) == ("ok", "2", "1", "4")
    assert (row["parity_checked"], float(row["parity_exact_share"])) == ("4", 1.0)
    sizes = [run.record["config"]["engine"][key] for key in ("token_budget", "max_sequences", "kv_memory")]
    assert sizes == [512, 64, 0.3]  # what auto was settled to before the ranks were started


@pytest.mark.slow
def test_each_replica_has_a_group_of_its_own(tmp_path: Path) -> None:
    everyone = launched(tmp_path, GROUPS, 4, OMP_NUM_THREADS="1")
    # A reduction that ignored its group would give 1111 everywhere.
    assert [rank["sum"] for rank in everyone] == [11, 11, 1100, 1100]
    assert [rank["place"] for rank in everyone] == [
        [0, 2, 0, True],
        [1, 2, 0, False],
        [0, 2, 2, True],
        [1, 2, 2, False],
    ]
    assert [rank["shared"] for rank in everyone] == [["from", 0], ["from", 0], ["from", 2], ["from", 2]]
    assert [rank["least"] for rank in everyone] == [99, 99, 97, 97]


@pytest.mark.slow
def test_auto_tp_shards_every_family_that_is_let_through(tmp_path: Path) -> None:
    """Two ranks with uneven heads (4 and 2 of 6) give the whole model's logits, in bfloat16 on packed weights too."""
    differences = launched(tmp_path, FAMILIES, 2, OMP_NUM_THREADS="1")
    assert {key.split()[0] for key in differences} == set(AUTO_TP_FAMILIES)
    for key, (difference, packed) in differences.items():
        assert difference < (1e-5 if key.endswith("float32") else 0.03), key
        assert packed == 0 or key.endswith("bfloat16")


def test_a_model_that_auto_tp_would_cut_wrongly_is_refused(tmp_path: Path) -> None:
    job = ["parallel.tp=2", "model=llama2_7b", "model.weights=dummy", "model.architecture.model_type=phi3"]
    done = answered(*job, f"results_dir={tmp_path}")
    assert_refused(done, "error: parallel.tp: 2: DeepSpeed's AutoTP is not known to shard 'phi3' models rightly")
    (row,) = read_rows(tmp_path / "runs.csv")
    assert row["status"] == "invalid"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "replicas"), [(0, 1), (1, 1), (3, 2)])
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, victim: int, replicas: int) -> None:
    """kill -9 of rank 0, of a rank that shares its model, and of one that shares the other replica's."""
    results = tmp_path / "results"
    process = start(results, "parallel.tp=2", f"parallel.dp={replicas}", forked=True)
    try:
        ranks_of(process)[victim].kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Traceback" not in errors
    (directory,) = (path.parent for path in results.glob("*/completions.jsonl"))
    record = read_record(str(results), directory.name)
    assert record is not None and record["status"] == "failed"
    assert "died" in record["error"] or "SIGKILL" in record["error"]
    assert record["completed"] == len(list(read_completions(directory / "completions.jsonl"))) > 0


STUCK = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from torch.distributed import TCPStore
from harness.ranks import signals

def hung(signum):
    print(signal.Signals(signum).name, flush=True)
    os._exit(7)

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
with signals.handled(0.2, hung, patience_s=0.5):
    store.wait(["never"])  # in C++ for minutes, as in a collective that the others have left
"""


def test_a_main_thread_that_does_not_come_back_is_ended_by_another(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (7, "SIGALRM\n"), done.stderr
