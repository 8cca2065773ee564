"""Tokens against Hugging Face: the reference model, and the check that ``verify=N`` makes at the end of a run."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness import checkpoint
from harness.checkpoint import Source
from harness.config import GenerationConfig
from harness.engines.base import greedy, stop_ids
from harness.environment import available_memory_bytes
from harness.errors import UserError, one_line
from harness.verification.judging import COARSE_REFERENCE, Judgement, Scores, bound_for, finite, judge
from harness.verification.pairs import first_difference
from harness.verification.recount import problems
from harness.workload import Completion, Request

if TYPE_CHECKING:
    from harness.job import Job

MOST_LOGITS = 2**27  # of one forward pass; half a GiB in float32
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
MEMORY_SHARE = 0.8  # of what is free, for weights; the rest is for activations
Progress = Callable[[int, int], None]  # completions done, of how many


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion to be scored: its prompt's ids and its own, which end with what the model was never fed."""

    index: int
    prompt: Sequence[int]
    ids: Sequence[int]


class Reference:
    """Hugging Face's model, in float32 where that fits the memory, otherwise in the run's own type.

    Args:
        source: the checkpoint.
        dtype: the run's type. Dummy weights are drawn in it, and then made float32: others would be drawn otherwise.
        generation: for the stop rule.
        device: ``cpu``, or ``cuda:N``; a model too large for it is spread over all devices by accelerate.
        sharded: whether the run's ranks shared the model; dummy weights are then drawn on the host.

    Raises:
        UserError: the checkpoint cannot be read.
    """

    def __init__(
        self, source: Source, dtype: str, generation: GenerationConfig, device: str, sharded: bool = False
    ) -> None:
        self.device = device
        self.dtype, device_map = _placed(source.architecture, dtype, device)
        dummy = source.kind == "dummy"
        self.model: Any = checkpoint.load_model(
            source,
            dtype=getattr(torch, dtype if dummy else self.dtype),
            device="cpu" if dummy and sharded else device,
            device_map=None if dummy and sharded else device_map,
        )
        if dummy:
            self.model = self.model.to(getattr(torch, self.dtype))
            if sharded and device != "cpu":
                self.model = self.model.to(device)
        self.exact = self.dtype == "float32"
        self.stop_ids = stop_ids(self.model, generation)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def description(self) -> str:
        """What it is, for the user."""
        return f"Hugging Face {self.dtype}"

    def generate(self, prompt: Sequence[int], output_len: int) -> list[int]:
        """Returns the ids of Hugging Face's greedy ``generate``, EOS included."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        output: list[int] = greedy(self.model, ids, output_len, self.stop_ids)[len(prompt) :].tolist()
        return output

    def scores(self, answers: Sequence[Answer], progress: Progress = lambda done, of: None) -> Iterator[Scores]:
        """Yields how the model sees each answer's ids, given its prompt and the ids before: one ``Scores`` each.

        Answers of like length share a pass, padded on the right, where no token of theirs sees the padding.
        """
        order = sorted(range(len(answers)), key=lambda number: len(answers[number].prompt) + len(answers[number].ids))
        found: dict[int, Scores] = {}
        most = min(PASS_TOKENS[torch.device(self.device).type], max(1, MOST_LOGITS // self.vocab_size))
        batch: list[int] = []
        for number in order:
            width = len(answers[number].prompt) + len(answers[number].ids)
            if batch and width * (len(batch) + 1) > most:
                found |= zip(batch, self._scores([answers[i] for i in batch]), strict=True)
                progress(len(found), len(answers))
                batch = []
            batch.append(number)
        if batch:
            found |= zip(batch, self._scores([answers[i] for i in batch]), strict=True)
            progress(len(found), len(answers))
        for number in range(len(answers)):
            yield found[number]

    @torch.inference_mode()
    def _scores(self, answers: list[Answer]) -> list[Scores]:
        known = [_within(answer.ids, self.vocab_size) for answer in answers]
        rows = [
            [*answer.prompt, *ids][: len(answer.prompt) + len(ids)] for answer, ids in zip(answers, known, strict=True)
        ]
        width = max(len(row) for row in rows)
        first = min(len(answer.prompt) for answer in answers) - 1  # the position that foretells the first output token
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.model.device)
        keep = torch.arange(first, width, device=self.model.device)
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        logits = self.model(input_ids=padded, use_cache=False, **options).logits
        logits = logits if self._keeps else logits[:, first:]
        found = []
        for row, (answer, ids) in enumerate(zip(answers, known, strict=True)):
            begin = len(answer.prompt) - 1 - first
            foreign = len(ids) < len(answer.ids)
            found.append(_scored(logits[row, begin : begin + len(ids) + foreign], ids, foreign))
        return found


def _within(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns ``ids`` up to the first that the model does not have."""
    return list(ids[: next((place for place, token in enumerate(ids) if not 0 <= token < vocab_size), len(ids))])


def _scored(logits: Tensor, ids: list[int], foreign: bool) -> Scores:
    """Returns the scores of ``ids``, ``[tokens]``, under ``logits``, ``[tokens, vocabulary]``; a foreign id follows."""
    logits = logits.float()
    best = logits.max(-1)
    spread = logits.std(-1)
    chosen = logits.gather(-1, torch.tensor(ids, dtype=torch.int64, device=logits.device)[:, None])[:, 0]
    gaps = ((best.values[: len(ids)] - chosen) / spread[: len(ids)]).tolist()
    return Scores(gaps + [float("inf")] * foreign, best.indices.tolist(), spread.tolist())


def _placed(architecture: dict[str, Any], dtype: str, device: str) -> tuple[str, str | None]:
    """Returns the type in which the reference fits the memory, and accelerate's map if it needs several devices."""
    devices = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    on_cuda = device.startswith("cuda")
    free = sum(devices) if on_cuda else available_memory_bytes()
    needed = checkpoint.required_bytes(architecture, 4)
    if needed is None or needed <= MEMORY_SHARE * free:
        chosen, bytes_needed = "float32", needed
    else:
        chosen, bytes_needed = dtype, checkpoint.required_bytes(architecture, getattr(torch, dtype).itemsize)
    if bytes_needed is not None and bytes_needed > free:
        needs = f"{bytes_needed / 2**30:.1f} GiB in {chosen}"
        raise MemoryError(f"its weights are {needs}, {free / 2**30:.1f} GiB are free")
    if not on_cuda:
        return chosen, None
    alone = torch.cuda.mem_get_info(device)[0]
    return chosen, None if bytes_needed is not None and bytes_needed <= MEMORY_SHARE * alone else "auto"


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
    from harness.display import Steps

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    config = job.config
    with as_user_error("verify"), Steps("requests checked", sys.stderr) as steps:
        reference = Reference(job.source, job.dtype, config.generation, device, config.parallel.tp > 1)
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
        _detail(request, len(prompt), completion, ids, judged.get(request.index), reference)
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
    prompt_tokens: int,
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
    stop = "eos" if reference.stop_ids else "length"
    found = problems(completion, stop, request, prompt_tokens, reference.stop_ids, reference.vocab_size)
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
