"""The dataset formats."""

from __future__ import annotations

from pathlib import Path

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, SyntheticPrompt
from harness.workload.json_file import _describe, _Record
from harness.workload.records import Request, Workload

SAMPLE_PATH = Path(__file__).resolve().parent / "data" / "sample.jsonl"
MAX_SAMPLES = 1_000_000  # synthetic requests; files are as long as they are
MAX_RANDOM_TOKENS = 100_000_000  # ids of dataset.prompt=random in total; each takes 8 bytes


def _synthetic(dataset: DatasetConfig) -> Workload:
    """The committee's workload without a dataset, or random ids of the same length."""
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
    return Workload(dataset.name, requests, None, None, seed=dataset.seed)


def _triple(record: _Record) -> Request:
    """Reads a record of ``asc24``, a list, or of ``sample``, an object with the same fields."""
    value = record.value
    if record.file.name == "sample" and isinstance(value, dict):
        value = [value.get(field) for field in ("prompt", "prompt_len", "output_len")]
    if not isinstance(value, list) or len(value) != 3:
        raise record.misshapen()
    prompt = record.text("prompt", value[0])
    if not prompt:
        raise record.error("prompt", "the string is empty")
    prompt_len = record.length("prompt_len", value[1])
    return Request(record.index, prompt, record.length("output_len", value[2]), prompt_len)


def _sharegpt(record: _Record, output_len: int | None) -> Request | None:
    """Returns the first turn as prompt and the second as reply, or None when they cannot be used."""
    if not isinstance(record.value, dict) or "conversations" not in record.value:
        raise record.misshapen()
    turns = record.value["conversations"]
    if not isinstance(turns, list):
        raise record.error("conversations", f"{_describe(turns)} is not a list")
    if len(turns) < 2:
        return None
    texts = []
    for number, turn in enumerate(turns[:2]):
        if not isinstance(turn, dict):
            raise record.error(f"conversations[{number}]", f"{_describe(turn)} is not an object")
        texts.append(record.text(f"conversations[{number}].value", turn.get("value")))
    prompt, reply = texts
    if not prompt or (output_len is None and not reply):
        return None
    return Request(record.index, prompt, output_len, reply=reply)
