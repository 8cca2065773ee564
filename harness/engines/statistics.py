"""Where the time of a run went and how full its passes were, of one replica or of several together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class EngineStatistics:
    """Where the time of :meth:`Engine.generate` went and how full the passes were.

    All times in seconds. ``prefill_s`` and ``decode_s`` are forward time, shared out by tokens where one
    pass held both; ``tokenize_s`` and ``detokenize_s`` are what of that work no pass hid; ``host_s`` is the rest:
    scheduling, building batches, bookkeeping. ``dropped_tokens`` were fed after an end that was not known yet,
    ``shared_prompt_tokens`` were not fed at all: another prompt had the same beginning, whose KV blocks they share.
    ``draft_tokens`` were fed on trial, and the ``accepted_draft_tokens`` among them became output.
    ``device_busy_s`` and ``device_gap_s`` are a GPU's time with a pass and between two, by its own clock; None where
    that is not measured.
    """

    steps: int | None = None
    preemptions: int | None = None
    recomputed_tokens: int | None = None
    dropped_tokens: int | None = None
    shared_prompt_tokens: int | None = None
    draft_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    kv_blocks: int | None = None
    kv_peak_utilisation: float | None = None
    peak_sequences: int | None = None
    mean_tokens_per_pass: float | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokenize_s: float = 0.0
    detokenize_s: float = 0.0
    device_busy_s: float | None = None
    device_gap_s: float | None = None


def merged_statistics(all_ranks: Sequence[EngineStatistics]) -> EngineStatistics:
    """Returns the statistics of several replicas as one: counts add up, peaks are the highest, times the mean."""
    whole = EngineStatistics()
    count = len(all_ranks)
    counts = (
        *("steps", "preemptions", "recomputed_tokens", "dropped_tokens", "shared_prompt_tokens"),
        *("draft_tokens", "accepted_draft_tokens", "kv_blocks"),
    )
    for name in counts:
        values = [getattr(rank, name) for rank in all_ranks]
        setattr(whole, name, None if None in values else sum(values))
    for name in ("kv_peak_utilisation", "peak_sequences"):
        values = [getattr(rank, name) for rank in all_ranks]
        setattr(whole, name, None if None in values else max(values))
    for name in ("prefill_s", "decode_s", "tokenize_s", "detokenize_s", "device_busy_s", "device_gap_s"):
        values = [getattr(rank, name) for rank in all_ranks]
        setattr(whole, name, None if None in values else sum(values) / count)
    if whole.steps and all(rank.mean_tokens_per_pass is not None for rank in all_ranks if rank.steps):
        tokens = sum((rank.mean_tokens_per_pass or 0) * (rank.steps or 0) for rank in all_ranks)
        whole.mean_tokens_per_pass = tokens / whole.steps
    return whole
