"""Tokens against Hugging Face's: the check that ``verify=N`` makes at the end of a run."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.basics.errors import UserError, one_line
from harness.machine import memory
from harness.models.judging import COARSE_REFERENCE, Judgement, bound_for, finite, judge
from harness.models.reference import Answer, Progress, Reference
from harness.verify.pairs import first_difference
from harness.verify.recount import problems
from harness.workload.records import Completion, Request

if TYPE_CHECKING:
    from harness.running.job import Job


def of_run(
    job: Job,
    device: str,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
) -> dict[str, Any]:
    """Checks completions of a run that is over, in its process, whose engine is gone; the record's section ``parity``.

    Args:
        device: of the run's rank 0.
        requests, prompts, completions: of the same requests, in the same order.

    Raises:
        UserError: the memory does not hold the reference.
    """
    from harness.basics.terminal import Steps

    memory.give_back(device)
    config = job.config
    with as_user_error("verify"), Steps("requests checked", sys.stderr) as steps:
        reference = Reference(job.source, job.dtype, config.generation, device, job.tp > 1)
        lines = [dataclasses.asdict(completion) for completion in completions]
        return check(reference, requests, prompts, lines, job.dtype, steps.update)


def check(
    reference: Reference,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[dict[str, Any]],
    dtype: str,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Compares completions with Hugging Face's own ``generate``; those that differ are judged token by token.

    Args:
        requests, prompts, completions: of the same requests, in the same order: the prompts' ids, and the lines of
            ``completions.jsonl``.
        dtype: the run's, for the bound.

    Returns:
        The record's section ``parity``, all but how the requests were chosen.
    """
    started = time.perf_counter()
    bound = bound_for(dtype) * (1.0 if reference.exact else COARSE_REFERENCE)
    own: list[list[int]] = []
    for request, prompt in zip(requests, prompts, strict=True):
        progress(len(own), len(requests))
        assert request.output_len is not None  # workload.resolve() has seen to it
        own.append(reference.generate(prompt, request.output_len))
    answers = [
        Answer(request.index, prompt, completion["token_ids"])
        for request, prompt, completion, ids in zip(requests, prompts, completions, own, strict=True)
        if completion["token_ids"] != ids and completion["token_ids"]
    ]
    judged = {
        answer.index: judge(answer.index, scores, bound)
        for answer, scores in zip(answers, reference.scores(answers), strict=True)
    }
    details = [
        _detail(request, prompt, completion, ids, judged.get(request.index), reference)
        for request, prompt, completion, ids in zip(requests, prompts, completions, own, strict=True)
    ]
    counts = {name: sum(detail["verdict"] == name for detail in details) for name in ("exact", "near_tie", "wrong")}
    progress(len(requests), len(requests))
    return {
        "checked": len(details),
        **counts,
        "reference": {"model": "Hugging Face generate", "dtype": reference.dtype, "device": reference.device},
        "bound": bound,
        "seconds": time.perf_counter() - started,
        "requests": details,
    }


def _detail(
    request: Request,
    prompt: Sequence[int],
    completion: dict[str, Any],
    own: list[int],
    judgement: Judgement | None,
    reference: Reference,
) -> dict[str, Any]:
    """Returns one checked request: ``exact``, ``near_tie`` or ``wrong``, and where and why."""
    ids = completion["token_ids"]
    detail: dict[str, Any] = {"index": request.index, "verdict": "exact", "tokens": len(ids)}
    position = first_difference(ids, own)
    if position is not None:
        detail |= {
            "position": position,
            "token_id": ids[position] if position < len(ids) else None,
            "reference_id": own[position] if position < len(own) else None,
        }
    ends = reference.ends
    stop = "eos" if ends.watched else "length"
    found = problems(completion, stop, ends, request, len(prompt), prompt, reference.vocab_size)
    problem = next(found, None)
    if judgement is not None:
        detail |= {"verdict": "near_tie", "largest_gap": finite(judgement.largest), "largest_gap_at": judgement.worst}
        if position is not None and position < len(judgement.scores.gaps):
            detail["gap"] = finite(judgement.scores.gaps[position])
        if judgement.wrong is not None:
            gap = judgement.scores.gaps[judgement.wrong]
            problem = problem or (
                f"token {judgement.wrong} is {ids[judgement.wrong]}, {gap:.3g} below the reference's "
                f"{judgement.scores.best[judgement.wrong]}"
            )
    if problem is not None:
        detail |= {"verdict": "wrong", "problem": problem}
    return detail


def sample(indices: Sequence[int], count: int, seed: str) -> list[int]:
    """Returns ``count`` of ``indices``, or all if there are fewer, drawn with ``seed``, in ascending order."""
    ordered = sorted(indices)
    return ordered if len(ordered) <= count else sorted(random.Random(seed).sample(ordered, count))


@contextmanager
def as_user_error(field: str) -> Iterator[None]:
    """Turns running out of memory into a :class:`UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        found = f"there is not enough memory for it ({one_line(str(error), 150)})"
        raise UserError(field, found, "use a larger machine") from error
