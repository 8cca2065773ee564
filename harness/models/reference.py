"""Hugging Face's model as the measure of tokens: its ``generate`` for one request alone, and what it thinks of ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import GenerationConfig
from harness.machine.memory import available_memory_bytes
from harness.models import loading
from harness.models.architecture import required_bytes, rotary_threshold
from harness.models.ends import Ends
from harness.models.generation import greedy, stop_ids, stopping_criteria
from harness.models.judging import BOUNDS, Scores
from harness.models.source import Source
from harness.models.tokenizer import load_tokenizer

MOST_LOGITS = 2**27  # of one forward pass; half a GiB in float32
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
MEMORY_SHARE = 0.8  # of what is free, for weights; the rest is for activations
CHECKED_TOKENS = 8  # of one answer a batch, against the same answer alone
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
        generation: for what ends a request.
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
        self.model: Any = loading.load_model(
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
        tokenizer = load_tokenizer(source) if generation.stop_strings else None
        self.ends = Ends.of(stop_ids(self.model, generation), generation, tokenizer)
        self._criteria = stopping_criteria(generation, tokenizer)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.threshold = rotary_threshold(self.model.config.to_dict())
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def description(self) -> str:
        """What it is, for the user."""
        return f"Hugging Face {self.dtype}"

    def generate(self, prompt: Sequence[int], output_len: int) -> list[int]:
        """Returns the ids of Hugging Face's greedy ``generate``, EOS and stop strings included."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        found = greedy(self.model, ids, output_len, self.ends.ids, stopping_criteria=self._criteria)
        output: list[int] = found[len(prompt) :].tolist()
        return output

    def scores(self, answers: Sequence[Answer], progress: Progress = lambda done, of: None) -> Iterator[Scores]:
        """Yields how the model sees each answer's ids, given its prompt and the ids before: one ``Scores`` each.

        What counts is the arithmetic of ``generate`` for one request alone. Answers of like length share a pass,
        padded on the right, where that is the same: the shortest of each batch is computed alone as well. A rotary
        embedding that looks at the longest sequence of a pass is known not to be.
        """
        found: dict[int, Scores] = {}
        for batch in self._batches(answers):
            found |= zip(batch, self._batch([answers[number] for number in batch]), strict=True)
            progress(len(found), len(answers))
        for number in range(len(answers)):
            yield found[number]

    def _batches(self, answers: Sequence[Answer]) -> Iterator[list[int]]:
        """Yields the numbers of answers that share a pass, the shortest first."""
        most = min(PASS_TOKENS[torch.device(self.device).type], max(1, MOST_LOGITS // self.vocab_size))
        batch: list[int] = []
        for number in sorted(range(len(answers)), key=lambda number: _width(answers[number])):
            width = _width(answers[number])
            # All on one side of the threshold share its frequencies; the others are computed alone.
            if batch and (width * (len(batch) + 1) > most or self._crosses(width)):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _crosses(self, width: int) -> bool:
        return self.threshold is not None and width > self.threshold

    def _batch(self, answers: list[Answer]) -> list[Scores]:
        if any(self._crosses(_width(answer)) for answer in answers):
            return [self._alone(answer) for answer in answers]
        together = self._together(answers)
        shortest = Answer(answers[0].index, answers[0].prompt, answers[0].ids[:CHECKED_TOKENS])
        alone, bound = self._alone(shortest), BOUNDS[self.dtype]
        if all(abs(one - other) <= bound for one, other in zip(alone.gaps, together[0].gaps, strict=False)):
            return together
        return [self._alone(answer) for answer in answers]

    def _alone(self, answer: Answer) -> Scores:
        """Has ``generate`` continue with the answer's own ids, a token a step."""
        ids = _within(answer.ids, self.vocab_size)
        foreign = len(ids) < len(answer.ids)
        logits = forced_logits(self.model, answer.prompt, [*ids, 0] if foreign else ids)
        return _scored(logits, ids, foreign)

    @torch.inference_mode()
    def _together(self, answers: list[Answer]) -> list[Scores]:
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


def forced_logits(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Returns what ``generate`` bases each choice on when it is made to choose ``ids``: float32 ``[tokens, vocab]``.

    Nothing is nearer to its arithmetic: the prompt in one pass, then a token a pass over its own cache.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    seen: list[Tensor] = []

    class Forcing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen = torch.full_like(scores, -torch.inf)
            chosen[:, ids[len(seen)]] = 0.0
            seen.append(scores[0].float().clone())
            return chosen

    prompt_ids = torch.tensor([list(prompt)], device=model.device)
    greedy(model, prompt_ids, len(ids), frozenset(), logits_processor=LogitsProcessorList([Forcing()]))
    return torch.stack(seen)


def _width(answer: Answer) -> int:
    return len(answer.prompt) + len(answer.ids)


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
    needed = required_bytes(architecture, 4)
    if needed is None or needed <= MEMORY_SHARE * free:
        chosen, bytes_needed = "float32", needed
    else:
        chosen, bytes_needed = dtype, required_bytes(architecture, getattr(torch, dtype).itemsize)
    if bytes_needed is not None and bytes_needed > free:
        needs = f"{bytes_needed / 2**30:.1f} GiB in {chosen}"
        raise MemoryError(f"its weights are {needs}, {free / 2**30:.1f} GiB are free")
    if not on_cuda:
        return chosen, None
    alone = torch.cuda.mem_get_info(device)[0]
    return chosen, None if bytes_needed is not None and bytes_needed <= MEMORY_SHARE * alone else "auto"
