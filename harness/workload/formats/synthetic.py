"""Prompts of one length, made up: no file."""

from __future__ import annotations

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, SyntheticPrompt
from harness.workload.formats.base import Format
from harness.workload.records import Request, Workload

MAX_RANDOM_TOKENS = 100_000_000  # ids of dataset.prompt=random in total; each takes 8 bytes


class Synthetic(Format):
    """The committee's workload without a dataset, or random ids of the same length."""

    name = "synthetic"
    required = ("num_samples", "input_len", "output_len")
    optional = ("prompt", "seed")
    max_samples = 1_000_000

    def read(self, dataset: DatasetConfig) -> Workload:
        """Returns the requests; random ids are drawn later, when the model's vocabulary is known."""
        num_samples, input_len = dataset.num_samples or 0, dataset.input_len or 0
        prompt = ""
        if dataset.prompt is SyntheticPrompt.hi:
            if input_len < 2:
                found = f'{input_len} makes the prompt "hi" * (input_len - 1) empty'
                raise UserError("dataset.input_len", found, "give at least 2, or use dataset.prompt=random")
            prompt = "hi" * (input_len - 1)
        elif num_samples * input_len > MAX_RANDOM_TOKENS:
            raise UserError(
                "dataset.num_samples",
                f"{num_samples:,} prompts of {input_len:,} random tokens are {num_samples * input_len:,} tokens",
                f"lower it or dataset.input_len to make at most {MAX_RANDOM_TOKENS:,}",
            )
        requests = [Request(index, prompt, dataset.output_len, input_len) for index in range(num_samples)]
        return Workload(self.name, requests, None, None, seed=dataset.seed)


FORMAT = Synthetic()
