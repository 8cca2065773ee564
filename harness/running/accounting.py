"""What is counted beside the tokens: the prompt lengths that a file claims, and the arithmetic a model needs."""

from __future__ import annotations

from typing import Any

from harness.models.architecture import attention_heads, parameters
from harness.running.job import Job
from harness.workload.records import Completion


class PromptLengths:
    """Compares the prompt lengths that a file claims with the ones that were fed."""

    def __init__(self, claimed: dict[int, int | None]) -> None:
        self.claimed = claimed
        self.checked = self.differing = self.difference = 0
        self.first: dict[str, int] | None = None

    def add(self, completion: Completion) -> None:
        """Books one completion."""
        claimed = self.claimed[completion.index]
        if claimed is None or completion.finish_reason == "rejected":
            return
        self.checked += 1
        difference = completion.prompt_tokens - claimed
        if difference:
            self.differing += 1
            self.difference += difference
            if self.first is None:
                self.first = {"index": completion.index, "claimed": claimed, "fed": completion.prompt_tokens}

    def record(self) -> dict[str, Any] | None:
        """Returns the comparison for the record, None when the file claims nothing."""
        if not self.checked:
            return None
        return {
            "checked": self.checked,
            "differing": self.differing,
            "sum_of_differences": self.difference,
            "first_difference": self.first,
        }

    def note(self) -> str:
        """Returns the difference as a sentence; only when there is one."""
        assert self.first is not None
        return (
            f"the dataset's prompt_len differs from the tokens fed in {self.differing} of {self.checked} requests, "
            f"{self.difference:+,} tokens in all (request {self.first['index']}: {self.first['claimed']} claimed, "
            f"{self.first['fed']} fed); only tokens fed are counted"
        )


class ModelFlops:
    """Floating-point operations that the completed requests need at least: matrix products and attention.

    What prompts share is needed once, for the first of them.

    Args:
        peak: of one rank, FLOP/s in the run's type; None where it is not known (:mod:`harness.running.peaks`).
    """

    def __init__(self, job: Job, peak: float | None) -> None:
        architecture = job.source.architecture
        self.count = parameters(architecture)
        heads, _, head_dim = attention_heads(architecture) if self.count else (0, 0, 0)
        self.per_pair = 4 * (architecture.get("num_hidden_layers") or 0) * heads * head_dim
        self.total = 0
        self.peak = peak * job.ranks if peak else None

    def add(self, completion: Completion) -> None:
        """Books one completion."""
        if self.count is None or completion.finish_reason == "rejected":
            return
        # The last generated token is never fed back.
        held, shared = completion.prompt_tokens + completion.output_tokens - 1, completion.shared_tokens or 0
        self.total += 2 * self.count.matmul * (held - shared) + 2 * self.count.head * completion.output_tokens
        self.total += self.per_pair * (held * (held + 1) - shared * (shared + 1)) // 2

    def utilisation(self, elapsed_s: float) -> float | None:
        """Returns the share of the devices' peak, None when that is not known."""
        return self.total / (elapsed_s * self.peak) if self.peak and self.total else None
