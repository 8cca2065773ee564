"""What a run's row and files say: its rates, how near to the roofline's bound and to the measured matrix rate."""

from __future__ import annotations

from typing import Any

from acceptance.findings import Figure
from acceptance.harness_run import HarnessRun
from acceptance.matrix.goals import MOST
from harness.config.devices import option_of
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs import bounds
from harness.costs.bounds import Limits
from harness.costs.lengths import Length, Lengths
from harness.costs.shape import ModelShape
from harness.results.completions import read_completions

TEXTS = ("run_id", "kernels", "dtype", "model")
COUNTS = ("requests", "completed", "token_budget", "max_sequences", "steps", "preemptions", "peak_memory_bytes")
NUMBERS = (
    *("total_tokens_per_s", "output_tokens_per_s", "elapsed_s", "load_s", "warmup_s", "ttft_p50_s", "ttft_p99_s"),
    *("device_busy_share", "model_flops_utilisation", "kv_peak_utilisation", "energy_j"),
)
OWN_BYTES = 2 << 30  # what the process itself takes of a GPU


def of_run(
    run: HarnessRun, architecture: dict[str, Any], hardware: HardwareConfig | None, bf16_flops: float | None
) -> dict[str, Figure]:
    """Returns the figures of a run that has ended well.

    Args:
        architecture: of its model.
        hardware: the device's figures; None where they are not known.
        bf16_flops: the rate that this device's products were measured to have.
    """
    assert run.row is not None
    found: dict[str, Figure] = {key: run.row[key] for key in TEXTS if run.row.get(key)}
    found |= {key: int(run.row[key]) for key in COUNTS if run.row.get(key)}
    found |= {key: float(run.row[key]) for key in NUMBERS if run.row.get(key)}
    found["run_s"] = round(run.seconds, 1)
    proof = run.record.get("proof") or {}
    if proof.get("seconds") is not None:
        found["proof_s"] = round(proof["seconds"], 1)
    flops = run.record.get("model_flops")
    if flops and bf16_flops and found.get("elapsed_s"):
        found["share_of_measured_rate"] = flops / float(found["elapsed_s"]) / bf16_flops
    if hardware is not None:
        best = bound(run, architecture, hardware)
        found |= {"bound_tokens_per_s": best, "share_of_bound": float(found["total_tokens_per_s"]) / best}
        if "share_of_measured_rate" in found:  # where memory bounds these requests, no engine reaches the rate
            found[MOST] = float(found["share_of_measured_rate"]) / float(found["share_of_bound"])
    return found


def bound(run: HarnessRun, architecture: dict[str, Any], hardware: HardwareConfig) -> float:
    """Returns the total tokens/s that the roofline allows for these very requests on one device.

    Its KV cache is all that the weights leave, whatever the engine made of it, so that engines have one measure.
    """
    assert run.row is not None and run.directory is not None
    shape = ModelShape.of(architecture, run.row["dtype"])
    lines = read_completions(run.directory / "completions.jsonl")
    items = [Length(one["prompt_tokens"], one["output_tokens"]) for one in lines if one["finish_reason"] != "rejected"]
    lengths = Lengths(items, "as they were", len(lines) - len(items))
    sequences = float(len(items))
    if hardware.memory_bytes:
        left = hardware.memory_bytes - OWN_BYTES - shape.matrix_bytes - shape.other_bytes
        sequences = bounds.sequences_at_once(lengths, max(left, 0.0) / shape.kv_token_bytes)
    limits = Limits.of(shape, hardware, run.row["dtype"], 1)
    return bounds.bounds(limits, lengths, 1, sequences)["mix"].total_tokens_per_s


def of_device(
    device_name: str, memory: int | None, flops: float | None, bandwidth: float | None
) -> HardwareConfig | None:
    """Returns a GPU's figures: its data sheet's where ``conf/hardware`` has it, else what was measured, or None.

    Args:
        memory: bytes.
        flops, bandwidth: measured: of bfloat16 products, of copies.
    """
    found = option_of(device_name)
    if found is not None or not (memory and flops and bandwidth):
        return found
    # Both are what large products and copies reach, which is less than a sheet says.
    peak, copies = flops / bounds.MATRIX_SHARE, bandwidth / bounds.MEMORY_SHARE
    return HardwareConfig(
        name=device_name,
        accelerator=Accelerator.cuda,
        peak_flops={"bfloat16": peak},
        memory_bytes=memory,
        memory_bandwidth=copies,
    )
