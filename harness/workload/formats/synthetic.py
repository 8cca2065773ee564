"""Prompts that are made up: no file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, SyntheticPrompt
from harness.workload.formats.base import Format
from harness.workload.lengths import Length
from harness.workload.records import Request, Workload

MAX_RANDOM_TOKENS = 100_000_000  # ids of dataset.prompt=random in total; each takes 8 bytes
HI = "hi"


class Synthetic(Format):
    """The committee's workload without a dataset, or random ids of the same length."""

    name = "synthetic"
    required = ("num_samples", "input_len", "output_len")
    optional = ("prompt", "seed", "shared_prefix", "prefixes")
    max_samples = 1_000_000

    def read(self, dataset: DatasetConfig) -> Workload:
        """Returns the requests, whose prompts have no length yet."""
        requests = [Request(index, "", None) for index in range(dataset.num_samples or 0)]
        seed, shared, prefixes = dataset.seed, dataset.shared_prefix, dataset.prefixes
        return Workload(self.name, requests, None, None, seed=seed, shared_prefix=shared, prefixes=prefixes)

    def lengthened(self, workload: Workload, dataset: DatasetConfig, lengths: Iterator[Length]) -> Workload:
        """Returns the requests with their prompts; random ids are drawn later, when the vocabulary is known."""
        taken = enumerate(islice(lengths, len(workload.requests)))
        if dataset.prompt is SyntheticPrompt.hi:
            requests = [_hi(index, length) for index, length in taken]
        else:
            requests = [_random(index, length, dataset.shared_prefix) for index, length in taken]
            _check_size(requests)
        return replace(workload, requests=requests)


def _hi(index: int, length: Length) -> Request:
    if length.tokens is None:
        found = "its file says no lengths of prompts, which are counted for random ids alone"
        raise UserError("dataset.input_len", found, "use dataset.prompt=random")
    if length.tokens < 2:
        found = f'{length.tokens} makes the prompt "hi" * (input_len - 1) empty'
        raise UserError("dataset.input_len", found, "give at least 2, or use dataset.prompt=random")
    return Request(index, HI * (length.tokens - 1), None, length.tokens)


def _random(index: int, length: Length, shared_prefix: int) -> Request:
    if length.tokens is None:
        return Request(index, "", None, like=length.text)
    return Request(index, "", None, shared_prefix + length.tokens)


def _check_size(requests: list[Request]) -> None:
    """Raises UserError for more ids than memory should hold; a text has at most a token a character or so."""
    total = sum(request.claimed_prompt_len or len(request.like or "") for request in requests)
    if total > MAX_RANDOM_TOKENS:
        raise UserError(
            "dataset.num_samples",
            f"{len(requests):,} prompts of {total // len(requests):,} random tokens are {total:,} tokens",
            f"lower it or dataset.input_len to make at most {MAX_RANDOM_TOKENS:,}",
        )


FORMAT = Synthetic()
