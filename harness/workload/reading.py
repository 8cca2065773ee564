"""The requests of a run: what one is, how one ends, and the readers of every ``dataset=`` option.

A bad file is refused here, before any weight is loaded, with the record and the field that are wrong.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from harness.basics.errors import UserError, quoted
from harness.config.schema import DatasetConfig, GenerationConfig, SyntheticPrompt
from harness.workload.datasets import MAX_SAMPLES, SAMPLE_PATH, _sharegpt, _synthetic, _triple
from harness.workload.json_file import MAX_LENGTH, _File, _wanted
from harness.workload.records import Request, Workload


def read(dataset: DatasetConfig) -> Workload:
    """Reads, checks and fingerprints the dataset; the whole file is checked even when few samples are taken.

    ``dataset.num_samples`` takes the first N usable records in the file's order. vLLM's
    ``benchmark_throughput`` shuffles a ShareGPT file; here nothing is shuffled, so runs are repeatable.
    A ShareGPT conversation is left out, and counted, when it has fewer than two turns, an empty prompt,
    or an empty reply that should give the output length.

    Raises:
        UserError: the config contradicts itself, the file cannot be read, or a record is wrong.
    """
    _check(dataset)
    if dataset.name == "synthetic":
        return _synthetic(dataset)
    path = str(SAMPLE_PATH) if dataset.name == "sample" else os.path.expanduser(dataset.path or "")
    file = _File(dataset.name, path)
    data, sha256 = file.read()
    parsed = [
        _sharegpt(record, dataset.output_len) if file.name == "sharegpt" else _triple(record)
        for record in file.records(data)
    ]
    requests: list[Request] = []
    left_out = 0
    for request in parsed:
        if len(requests) == dataset.num_samples:
            break
        if request is None:
            left_out += 1
        else:
            requests.append(replace(request, index=len(requests)))
    if not requests:
        raise file.error(f"none of the {left_out:,} conversations has a prompt and a reply")
    if dataset.num_samples is not None and len(requests) < dataset.num_samples:
        raise UserError(
            "dataset.num_samples",
            f"{dataset.num_samples:,} asked for, but {quoted(path, 300)} holds {len(requests):,}"
            + (f" ({left_out:,} more are not usable)" if left_out else ""),
            f"give a number from 1 to {len(requests)}, or null for all",
        )
    return Workload(dataset.name, requests, path, sha256, left_out)


def resolve(
    workload: Workload,
    generation: GenerationConfig,
    *,
    vocab_size: int | None = None,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
) -> Workload:
    """Settles what needs the model's vocabulary; afterwards every ``output_len`` is an int of at least 1.

    Counts the replies that give output lengths, leaves out the conversations whose reply has no token
    (the later requests move up), draws the random prompt ids and applies ``generation.max_output_len``.

    Args:
        workload: as ``read`` returned it.
        generation: for ``max_output_len``.
        vocab_size: ids are drawn below it; needed by ``dataset.prompt=random``.
        count_tokens: token counts of a list of texts, called at most once; needed by ShareGPT replies.

    Raises:
        UserError: ``generation.max_output_len`` is below 1, or no conversation is left.
        ValueError: an argument that this workload needs is missing or wrong.
    """
    cap = generation.max_output_len
    if cap is not None and cap < 1:
        raise UserError("generation.max_output_len", f"{cap} is below 1", "give 1 or more, or null for no limit")
    lengths = {request.index: request.output_len for request in workload.requests}
    uncounted = [request for request in workload.requests if request.output_len is None]
    if uncounted:
        if count_tokens is None:
            raise ValueError("count_tokens is needed: these requests take their output_len from a reply")
        counts = count_tokens([request.reply or "" for request in uncounted])
        lengths.update(zip((request.index for request in uncounted), counts, strict=True))
    drawn = _random_ids(workload, vocab_size)
    requests: list[Request] = []
    for request in workload.requests:
        output_len, prompt_ids = lengths[request.index], request.prompt_ids
        if not output_len:
            continue
        if not request.prompt and prompt_ids is None:
            prompt_ids = next(drawn)
        output_len = output_len if cap is None else min(output_len, cap)
        requests.append(replace(request, index=len(requests), output_len=output_len, prompt_ids=prompt_ids))
    left_out = workload.left_out + len(workload.requests) - len(requests)
    if not requests:
        found = f"none of the {left_out:,} conversations has a reply of at least one token"
        raise _File(workload.name, str(workload.path)).error(found)
    return replace(workload, requests=requests, left_out=left_out)


def _random_ids(workload: Workload, vocab_size: int | None) -> Iterator[tuple[int, ...]]:
    """Yields each request's ``claimed_prompt_len`` ids, the same ones for the same seed."""
    if vocab_size is None or vocab_size < 1:
        raise ValueError(f"vocab_size is needed to draw random token ids, not {vocab_size}")
    # The first three ids are <unk>, <s> and </s> in LLaMA-2's vocabulary. A list, because ids drawn from it
    # are shared objects; a range would make a new one for every token.
    ids = list(range(min(3, vocab_size - 1), vocab_size))
    rng = random.Random(workload.seed)
    for request in workload.requests:
        yield tuple(rng.choices(ids, k=request.claimed_prompt_len or 0))


def _check(dataset: DatasetConfig) -> None:
    """Refuses keys that the chosen dataset needs and lacks, or cannot use."""
    name, option = dataset.name, f"dataset={dataset.name}"
    if name not in ("sample", "asc24", "sharegpt", "synthetic"):
        options = "sample, asc24, sharegpt or synthetic"
        raise UserError("dataset.name", f"unknown dataset {quoted(name)}", f"use {options}")
    if name in ("asc24", "sharegpt"):
        if not dataset.path:
            raise UserError("dataset.path", f"not given with {option}", f"give the path of {_wanted(name)}")
    elif dataset.path is not None:
        raise UserError(
            "dataset.path",
            f"{quoted(dataset.path, 300)} given with {option}, which reads no file of yours",
            "leave it out, or use dataset=asc24 or dataset=sharegpt to run your own file",
        )
    required = name == "synthetic"
    _check_range("dataset.num_samples", dataset.num_samples, MAX_SAMPLES if required else None, required)
    for key, value in (("input_len", dataset.input_len), ("output_len", dataset.output_len)):
        if value is not None and not required and (name, key) != ("sharegpt", "output_len"):
            limit = ", or limit the outputs with generation.max_output_len" if key == "output_len" else ""
            found = f"{value} given with {option}, which brings its own lengths"
            raise UserError(f"dataset.{key}", found, f"leave it out{limit}")
        _check_range(f"dataset.{key}", value, MAX_LENGTH, required)
    if dataset.prompt is not SyntheticPrompt.hi and not required:
        found = f"{dataset.prompt.value} given with {option}, which brings its own prompts"
        raise UserError("dataset.prompt", found, "leave it out, or use dataset=synthetic")


def _check_range(field: str, value: int | None, limit: int | None, required: bool) -> None:
    if (value is None and required) or (value is not None and not 1 <= value <= (limit or value)):
        found = "not given" if value is None else f"{value} is out of range"
        remedy = "give a whole number from 1" + (f" to {limit:,}" if limit else "")
        raise UserError(field, found, remedy + ("" if required else ", or null"))
