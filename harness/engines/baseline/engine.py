"""The committee's loop: one request after the other, as ASC24's ``baseline.py`` runs them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from harness.basics.clock import Clock
from harness.engines.base import Engine, Progress, rejection
from harness.engines.baseline.config import BaselineConfig
from harness.engines.scoring import Score, Scored, force, grouped
from harness.engines.statistics import EngineStatistics
from harness.models import architecture, loading, tokenizer
from harness.models.ends import Ends
from harness.models.generation import greedy, stop_ids, stopping_criteria
from harness.workload.records import Completion, PassRecord, Request


class BaselineEngine(Engine[BaselineConfig]):
    """Batch size 1, in the dataset's order, greedy ``generate``; timed: tokenize, generate, decode."""

    @property
    def kernels(self) -> str:
        return "huggingface"

    @property
    def provable(self) -> bool:
        return False  # it is the model that others are compared with

    def load(self) -> None:
        """Loads the model; one larger than the device is spread over all there are by accelerate."""
        settings = self.settings
        self.tokenizer = tokenizer.load_tokenizer(settings.source)
        self.model = loading.load_model(
            settings.source,
            dtype=getattr(torch, settings.dtype),
            device=settings.device,
            device_map=self._device_map(),
        )
        self.ends = Ends.of(stop_ids(self.model, settings.generation), settings.generation, self.tokenizer)
        self.criteria = stopping_criteria(settings.generation, self.tokenizer)

    def _device_map(self) -> str | None:
        if not self.settings.device.startswith("cuda"):
            return None
        itemsize = getattr(torch, self.settings.dtype).itemsize
        needed = architecture.required_bytes(self.settings.source.architecture, itemsize)
        free = torch.cuda.mem_get_info(self.settings.device)[0]
        return "auto" if needed is None or needed > 0.9 * free else None

    def warm_up(self) -> None:
        """Generates two tokens from a short prompt; the committee's script has no warm-up at all."""
        self._generate(torch.ones(1, 8, dtype=torch.int64), 2, None)

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields completions in the dataset's order; see :meth:`Engine.generate`."""
        self.statistics = statistics = EngineStatistics(steps=0, peak_sequences=1)
        prompt_tokens = output_tokens = steps = 0
        for request in requests:
            started = time.perf_counter()
            assert request.output_len is not None  # workload.resolve() has seen to it
            ids = request.prompt_ids or self.tokenizer(request.prompt).input_ids
            input_ids = torch.tensor([ids], dtype=torch.int64)
            statistics.tokenize_s += time.perf_counter() - started
            length = input_ids.shape[1]
            reason = self.too_long(length, request.output_len)
            if reason:
                yield rejection(request, reason, clock)
                continue
            begun = clock()
            timer = _FirstToken(clock)
            ids = self._generate(input_ids, request.output_len, timer)
            ended = clock()
            decoding = time.perf_counter()
            self.tokenizer.decode(ids, skip_special_tokens=True)  # the committee decodes the prompt as well
            tokens = ids.tolist()
            output = tokens[length:]
            text = self.ends.text(self.decode, tokens[:length], output)
            statistics.detokenize_s += time.perf_counter() - decoding
            first = timer.first_s if timer.first_s is not None else ended
            statistics.prefill_s += first - begun
            statistics.decode_s += ended - first
            steps += 1
            prompt_tokens += length
            output_tokens += len(output)
            statistics.steps = steps
            self.on_pass(
                PassRecord(
                    step=steps,
                    started_s=begun,
                    seconds=ended - begun,
                    tokens=length + len(output),
                    prompt_tokens=length,
                    decode_tokens=len(output),
                    sequences=1,
                    kv_utilisation=None,
                    waiting=None,
                )
            )
            self.on_progress(Progress(1, 0, None, prompt_tokens, output_tokens))
            yield Completion(
                index=request.index,
                prompt_tokens=length,
                output_tokens=len(output),
                finish_reason=self.ends.reason(tokens, len(tokens) - 1) or "length",
                token_ids=output,
                text=text,
                first_token_s=first,
                finished_s=clock(),
            )

    def score(self, items: Iterable[Scored], prefill: bool = False) -> Iterator[Score]:
        """Yields scores in order, always one forward of the whole sequence; see :meth:`Engine.score`."""
        for forced in grouped(items):
            if reason := self.unscorable(forced):
                yield from forced.refused(reason)
                continue
            length = len(forced.target)
            ids = torch.tensor([forced.context + forced.target[:-1]], device=self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=length).logits[0]
            force(logits, [forced] * length)
            yield from forced.scores

    def _generate(self, input_ids: torch.Tensor, output_len: int, streamer: Any) -> torch.Tensor:
        """Returns prompt and output ids ``[tokens]`` on the CPU."""
        prompt, stop = input_ids.to(self.model.device), self.ends.ids
        options = {"streamer": streamer, "stopping_criteria": self.criteria}
        return greedy(self.model, prompt, output_len, stop, **options).cpu()


class _FirstToken:
    """A streamer that only notes when the first token came: ``generate`` puts the prompt, then each token."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.puts = 0
        self.first_s: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first_s = self.clock()

    def end(self) -> None:
        pass
