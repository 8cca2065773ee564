"""``deepspeed.init_inference``: AutoTP or injected kernels, over static batches sorted by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from harness.basics.clock import Clock
from harness.engines.base import Engine, EngineSettings, Progress, rejection
from harness.engines.ds_inference import checks, kernel_inject
from harness.engines.ds_inference.batches import Batches, Pass
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.static_cache import ATTENTION, StaticCache, static_attention
from harness.engines.scoring import Forced, Score, Scored, grouped, no_prefill
from harness.engines.shared import auto_tp
from harness.engines.shared.packed_linear import can_pack, pack_linears
from harness.engines.shared.plain_attention import probe
from harness.engines.statistics import EngineStatistics
from harness.models import tokenizer
from harness.models.ends import Ends
from harness.models.generation import stop_ids
from harness.workload.records import Completion, PassRecord, Request


@dataclass(slots=True)
class _Row:
    """One request of a batch."""

    request: Request
    prompt: list[int]
    output_len: int
    tokens: list[int]  # its prompt and its output
    first_token_s: float | None = None

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.output_len


class DsInferenceEngine(Engine[DsInferenceConfig]):
    """Static batches: requests of like length start together, and a batch ends with its last row."""

    def __init__(self, settings: EngineSettings[DsInferenceConfig]) -> None:
        super().__init__(settings)
        self.batches = Batches(settings)

    @property
    def kernels(self) -> str:
        return "injected" if self.settings.engine.kernel_inject else "torch"

    @property
    def suspect(self) -> tuple[str, str, str]:
        """See :attr:`Engine.suspect`."""
        if self.settings.engine.kernel_inject:
            found = "true: DeepSpeed's injected kernels do not compute this model here"
            return "engine.kernel_inject", found, "use engine.kernel_inject=false"
        return super().suspect

    @property
    def limits(self) -> dict[str, int]:
        return {"max_sequences": self.settings.engine.batch_size}

    def load(self) -> None:
        """Loads the model and hands it to ``deepspeed.init_inference``."""
        from transformers import AttentionInterface

        settings = self.settings
        AttentionInterface.register(ATTENTION, static_attention)
        self.tokenizer = tokenizer.load_tokenizer(settings.source)
        if settings.engine.kernel_inject:
            self._load_injected()
            return
        model = auto_tp.load_whole(settings, ATTENTION)
        self._end_as(model)
        self.batches.engine = auto_tp.init_inference(model, settings, enable_cuda_graph=settings.engine.cuda_graph)
        probe(self.batches.engine.module, "static", settings.device, settings.max_context, "ds_inference")
        if settings.engine.cuda_graph:
            self.batches.graphed = StaticCache(settings.engine.batch_size, self._width, settings.device, fixed=True)
        if can_pack(torch.device(settings.device), getattr(torch, settings.dtype)):
            pack_linears(self.batches.engine.module)

    def _load_injected(self) -> None:
        """Loads the model and replaces its layers by DeepSpeed's."""
        settings = self.settings
        checks.check_injection(settings.source.architecture, settings.tp)
        kernel_inject.build(settings.leads)
        model = auto_tp.load_whole(settings, "eager")
        self._end_as(model)
        self.batches.engine = auto_tp.init_inference(
            model, settings, **kernel_inject.OPTIONS, max_out_tokens=self._width + settings.engine.batch_size
        )
        self.batches.injected = kernel_inject.InjectedBatch(
            self.batches.engine.module,
            settings.engine.batch_size,
            settings.device,
            getattr(torch, settings.dtype),
        )

    def _end_as(self, model: Any) -> None:
        """Settles what ends a request, on all ranks that share the model: each looks for itself."""
        generation = self.settings.generation
        self.ends = self.batches.ends = Ends.of(stop_ids(model, generation), generation, self.tokenizer)

    @property
    def _width(self) -> int:
        """Columns of a row where all batches share one size: with injected kernels and under a CUDA graph."""
        return checks.row_width(self.settings.engine.batch_tokens, self.settings.engine.batch_size)

    def warm_up(self) -> None:
        """Runs one full batch of made-up prompts for a few tokens."""
        if not self.settings.leads:
            self.follow()
            return
        rows = self.settings.engine.batch_size
        length = min(64, (self.settings.max_context or 64) - 4, self._width - 4)
        if length > 0:
            for _ in self._passes([[1] * length] * rows, [4] * rows):
                pass
        self._release()

    def arrange(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the longest outputs first, then the longest prompts: neighbours become a batch."""
        return sorted(
            requests, key=lambda request: (-(request.output_len or 0), -len(request.prompt_ids or request.prompt))
        )

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields completions as their rows finish; see :meth:`Engine.generate`."""
        self.statistics = statistics = EngineStatistics(steps=0, peak_sequences=0)
        intake = iter(requests)
        ready: list[_Row] = []
        prompt_tokens = output_tokens = steps = tokens = 0
        more = True
        while more or ready:
            while more and len(ready) < self.settings.engine.batch_size:
                taken = list(islice(intake, self.settings.engine.batch_size - len(ready)))
                more = bool(taken)
                rejected, rows = self._admit(taken, clock)
                ready += rows
                yield from rejected
            batch = ready[: self._fit([(len(row.prompt), row.output_len) for row in ready])]
            ready = ready[len(batch) :]
            live = len(batch)
            statistics.peak_sequences = max(statistics.peak_sequences or 0, live)
            for step in self._passes([row.prompt for row in batch], [row.output_len for row in batch]):
                now = clock()
                steps += 1
                tokens += step.prompt_tokens + step.decode_tokens
                prompt_tokens += step.prompt_tokens
                output_tokens += len(step.rows)
                statistics.prefill_s += step.seconds if step.prompt_tokens else 0.0
                statistics.decode_s += step.seconds if step.decode_tokens else 0.0
                self.on_pass(
                    PassRecord(
                        step=steps,
                        started_s=now - step.seconds,
                        seconds=step.seconds,
                        tokens=step.prompt_tokens + step.decode_tokens,
                        prompt_tokens=step.prompt_tokens,
                        decode_tokens=step.decode_tokens,
                        sequences=len(step.rows),
                        kv_utilisation=None,
                        waiting=len(ready),
                    )
                )
                self.on_progress(Progress(live, len(ready), None, prompt_tokens, output_tokens))
                for number, token in zip(step.rows, step.tokens, strict=True):
                    row = batch[number]
                    row.tokens.append(token)
                    if row.first_token_s is None:
                        row.first_token_s = now
                    if self.batches.finished(row.tokens, row.most_tokens):
                        live -= 1
                        yield self._complete(row, clock)
        self._release()
        statistics.steps = steps
        statistics.mean_tokens_per_pass = tokens / steps if steps else None

    def follow(self) -> None:
        """Computes the leader's batches; see :meth:`Engine.follow`."""
        assert self.settings.tensor is not None
        while (batch := self.settings.tensor.share()) is not None:
            for _ in self.batches.compute(*batch):
                pass

    def score(self, items: Iterable[Scored], prefill: bool = False) -> Iterator[Score]:
        """Yields scores batch by batch, a target token a decode step; see :meth:`Engine.score`."""
        if prefill:
            raise no_prefill("ds_inference")
        intake = grouped(items)
        while taken := list(islice(intake, self.settings.engine.batch_size)):
            fitting: list[Forced] = []
            for forced in taken:
                reason = self.unscorable(forced) or self._too_wide(len(forced.context), len(forced.target))
                if reason:
                    yield from forced.refused(reason)
                else:
                    fitting.append(forced)
            while fitting:
                batch = fitting[: self._fit([(len(forced.context), len(forced.target)) for forced in fitting])]
                fitting = fitting[len(batch) :]
                contexts, lengths = [forced.context for forced in batch], [len(forced.target) for forced in batch]
                for _ in self._passes(contexts, lengths, batch):
                    pass
                for forced in batch:
                    yield from forced.scores
        self._release()

    def _release(self) -> None:
        if self.settings.tensor is not None:
            self.settings.tensor.share(None)

    def _admit(self, requests: list[Request], clock: Clock) -> tuple[list[Completion], list[_Row]]:
        """Tokenizes requests; returns the rejections, and a row for each of the others."""
        rejected, rows = [], []
        for request, prompt in zip(requests, self.tokenize(requests), strict=True):
            assert request.output_len is not None  # workload.resolve() has seen to it
            reason = self._too_wide(len(prompt), request.output_len) or self.too_long(len(prompt), request.output_len)
            if reason:
                rejected.append(rejection(request, reason, clock))
            else:
                rows.append(_Row(request, prompt, request.output_len, list(prompt)))
        return rejected, rows

    def _complete(self, row: _Row, clock: Clock) -> Completion:
        """Returns what came of a request."""
        reason = self.batches.ends.reason(row.tokens, len(row.tokens) - 1) or "length"
        index, length = row.request.index, len(row.prompt)
        output = row.tokens[length:]
        return self.completion(index, length, output, reason, row.first_token_s, clock, prompt=row.prompt)

    def _too_wide(self, prompt: int, output_len: int) -> str | None:
        """Returns why injected kernels have no room for a request of so many tokens, or None when they have."""
        return None if self.batches.injected is None else checks.too_wide(self._width, prompt, output_len)

    def _fit(self, lengths: list[tuple[int, int]]) -> int:
        """Returns how many of the first rows, prompt and output tokens, fit a batch: one at least."""
        prompt = output = 0
        for count, row in enumerate(lengths):
            prompt, output = max(prompt, row[0]), max(output, row[1])
            rows = count + 1 if self.batches.injected is None else self.settings.engine.batch_size
            if count and rows * (prompt + output) > self.settings.engine.batch_tokens:
                return count
        return len(lengths)

    def _passes(
        self, prompts: list[list[int]], output_lens: list[int], forced: list[Forced] | None = None
    ) -> Iterator[Pass]:
        """Computes a batch on all ranks that share the model; the leader's. See :meth:`Batches.compute`."""
        if not prompts:
            return
        if self.settings.tensor is not None:
            self.settings.tensor.share((prompts, output_lens, forced))
        yield from self.batches.compute(prompts, output_lens, forced)
