"""The requests of a run: read from its dataset, then settled by the model's tokenizer and vocabulary.

A bad file is refused here, before any weight is loaded, with the record and the field that are wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig, GenerationConfig
from harness.workload import catalogue, keys
from harness.workload.json_file import Misshapen
from harness.workload.records import Request, Workload


def read(dataset: DatasetConfig) -> Workload:
    """Reads, checks and fingerprints the dataset; the whole file is checked even when few samples are taken.

    ``dataset.num_samples`` takes the first N usable records in the file's order.

    Raises:
        UserError: the config contradicts itself, the file cannot be read, or a record is wrong.
    """
    found = catalogue.find(dataset.name)
    keys.check(dataset, found)
    try:
        return found.read(dataset)
    except Misshapen as error:
        other = catalogue.recognising(error.value, besides=found)
        if other is None:
            raise
        raise UserError(error.field, error.found, f"use dataset={other} for this file") from None


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
        raise catalogue.find(workload.name).none_usable(workload, found)
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
