"""``deepspeed.init_inference``: AutoTP or injected kernels, over static batches sorted by length."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from harness.basics.clock import Clock
from harness.engines.base import Engine, EngineSettings, EngineStatistics, Progress, rejection
from harness.engines.ds_inference import checks, kernel_inject
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.engines.ds_inference.static_cache import ATTENTION, StaticCache, static_attention
from harness.engines.scoring import Forced, Score, Scored, force, grouped, no_prefill
from harness.engines.shared import auto_tp
from harness.engines.shared.packed_linear import can_pack, pack_linears
from harness.engines.shared.plain_attention import probe
from harness.models import tokenizer
from harness.models.generation import stop_ids
from harness.workload.records import Completion, PassRecord, Request


@dataclass(slots=True)
class _Row:
    """One request of a batch."""

    request: Request
    prompt: list[int]
    output_len: int
    output: list[int]
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward: what it computed, padding not counted, and the next token of each of ``rows``."""

    rows: list[int]
    tokens: list[int]
    prompt_tokens: int
    decode_tokens: int
    seconds: float


class DsInferenceEngine(Engine[DsInferenceConfig]):
    """Static batches: requests of like length start together, and a batch ends with its last row."""

    def __init__(self, settings: EngineSettings[DsInferenceConfig]) -> None:
        super().__init__(settings)
        self.graphed: StaticCache | None = None  # with cuda_graph: the buffers that the captured graph reads
        self.injected: InjectedBatch | None = None  # with kernel_inject
        self.forced: list[Forced] | None = None  # what the batch at hand is made to continue with, when it is scored

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
        self.stop_ids = stop_ids(model, settings.generation)
        self.engine = auto_tp.init_inference(model, settings, enable_cuda_graph=settings.engine.cuda_graph)
        probe(self.engine.module, "static", settings.device, settings.max_context, "ds_inference")
        if settings.engine.cuda_graph:
            self.graphed = StaticCache(settings.engine.batch_size, self._width, settings.device, fixed=True)
        if can_pack(torch.device(settings.device), getattr(torch, settings.dtype)):
            pack_linears(self.engine.module)

    def _load_injected(self) -> None:
        """Loads the model and replaces its layers by DeepSpeed's."""
        settings = self.settings
        kernel_inject.refuse_unsupported(settings.source.architecture, settings.tp)
        model = auto_tp.load_whole(settings, "eager")
        self.stop_ids = stop_ids(model, settings.generation)
        self.engine = auto_tp.init_inference(
            model, settings, **kernel_inject.OPTIONS, max_out_tokens=self._width + settings.engine.batch_size
        )
        self.injected = kernel_inject.InjectedBatch(
            self.engine.module,
            settings.engine.batch_size,
            settings.device,
            getattr(torch, settings.dtype),
        )

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
                    row.output.append(token)
                    if row.first_token_s is None:
                        row.first_token_s = now
                    if self._finished(token, len(row.output), row.output_len):
                        live -= 1
                        reason = "eos" if token in self.stop_ids else "length"
                        index, length = row.request.index, len(row.prompt)
                        yield self.completion(index, length, row.output, reason, row.first_token_s, clock)
        self._release()
        statistics.steps = steps
        statistics.mean_tokens_per_pass = tokens / steps if steps else None

    def follow(self) -> None:
        """Computes the leader's batches; see :meth:`Engine.follow`."""
        assert self.settings.tensor is not None
        while (batch := self.settings.tensor.share()) is not None:
            for _ in self._compute(*batch):
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
                rows.append(_Row(request, prompt, request.output_len, []))
        return rejected, rows

    def _too_wide(self, prompt: int, output_len: int) -> str | None:
        """Returns why injected kernels have no room for a request of so many tokens, or None when they have."""
        return None if self.injected is None else checks.too_wide(self._width, prompt, output_len)

    def _fit(self, lengths: list[tuple[int, int]]) -> int:
        """Returns how many of the first rows, prompt and output tokens, fit a batch: one at least."""
        prompt = output = 0
        for count, row in enumerate(lengths):
            prompt, output = max(prompt, row[0]), max(output, row[1])
            rows = count + 1 if self.injected is None else self.settings.engine.batch_size
            if count and rows * (prompt + output) > self.settings.engine.batch_tokens:
                return count
        return len(lengths)

    def _finished(self, token: int, generated: int, output_len: int) -> bool:
        return (self.forced is None and token in self.stop_ids) or generated >= output_len

    def _passes(
        self, prompts: list[list[int]], output_lens: list[int], forced: list[Forced] | None = None
    ) -> Iterator[Pass]:
        """Computes a batch on all ranks that share the model; the leader's. See :meth:`_compute`."""
        if not prompts:
            return
        if self.settings.tensor is not None:
            self.settings.tensor.share((prompts, output_lens, forced))
        yield from self._compute(prompts, output_lens, forced)

    @torch.inference_mode()
    def _compute(self, prompts: list[list[int]], output_lens: list[int], forced: list[Forced] | None) -> Iterator[Pass]:
        """Computes a batch to its end, pass by pass; ``forced`` says which tokens come, and books their scores."""
        self.forced = forced
        if self.injected is not None:
            yield from self._compute_injected(self.injected, prompts, output_lens)
            return
        lengths = [len(prompt) for prompt in prompts]
        cache = self._cache(len(prompts), max(lengths) + max(output_lens))
        cache.start(lengths)
        newest = [0] * len(prompts)
        generated = [0] * len(prompts)

        def book(step: Pass) -> Pass:
            for request, token in zip(step.rows, step.tokens, strict=True):
                newest[request] = token
                generated[request] += 1
            return step

        def finished(request: int) -> bool:
            return self._finished(newest[request], generated[request], output_lens[request])

        for group in prefill_groups(lengths):
            yield book(self._prefill(cache, group, prompts))
        live = list(range(len(prompts)))  # which request stands in which row of the cache
        while True:
            if cache.fixed:
                live = [request for request in live if not finished(request)]
            else:
                for row in reversed(range(len(live))):
                    if finished(live[row]):
                        live[row] = live[cache.drop(row)]
                        live.pop()
            if not live:
                return
            rows = range(len(prompts)) if cache.fixed else live
            positions = [lengths[request] + generated[request] - 1 for request in rows]
            yield book(self._decode(cache, live, [newest[request] for request in rows], positions))

    def _compute_injected(
        self, batch: InjectedBatch, prompts: list[list[int]], output_lens: list[int]
    ) -> Iterator[Pass]:
        """The same with injected layers, which take all rows to the end."""
        started = time.perf_counter()
        live = list(range(len(prompts)))
        newest = self._choose(batch.prefill(prompts), live, whole=True)
        yield Pass(live, newest[: len(live)], sum(map(len, prompts)), 0, time.perf_counter() - started)
        generated = 1
        while live := [row for row in live if not self._finished(newest[row], generated, output_lens[row])]:
            started = time.perf_counter()
            newest = self._choose(batch.decode(newest), live, whole=True)
            generated += 1
            yield Pass(live, [newest[row] for row in live], 0, len(live), time.perf_counter() - started)

    def _cache(self, rows: int, width: int) -> StaticCache:
        """Returns room for a batch: of its own size, or under a CUDA graph the one that all batches share."""
        device = self.settings.device
        if self.graphed is not None and width <= self.graphed.width:
            return self.graphed
        return StaticCache(rows, width, device)

    def _prefill(self, cache: StaticCache, rows: list[int], prompts: list[list[int]]) -> Pass:
        started = time.perf_counter()
        columns = max(len(prompts[row]) for row in rows)
        ids = torch.zeros(len(rows), columns, dtype=torch.int64)
        positions = torch.zeros(len(rows), columns, dtype=torch.int64)
        for place, row in enumerate(rows):
            begin = columns - len(prompts[row])
            ids[place, begin:] = torch.tensor(prompts[row])
            positions[place, begin:] = torch.arange(columns - begin)
        cache.begin_prefill(rows, columns)
        tokens = self._forward(self.engine.module, cache, ids, positions, rows)
        return Pass(rows, tokens, sum(len(prompts[row]) for row in rows), 0, time.perf_counter() - started)

    def _decode(self, cache: StaticCache, live: list[int], newest: list[int], positions: list[int]) -> Pass:
        started = time.perf_counter()
        cache.begin_decode()
        empty = [0] * (cache.rows - len(newest)) if cache.fixed else []
        ids, places = torch.tensor([newest + empty]), torch.tensor([positions + empty])
        # DeepSpeed captures its graph in the engine's own forward, and replays it for whatever follows.
        model = self.engine if cache.fixed else self.engine.module
        tokens = self._forward(model, cache, ids.T, places.T, live)
        if cache.fixed:
            tokens = [tokens[request] for request in live]
        return Pass(list(live), tokens, 0, len(live), time.perf_counter() - started)

    def _forward(
        self, model: Any, cache: StaticCache, ids: torch.Tensor, positions: torch.Tensor, requests: list[int]
    ) -> list[int]:
        """Returns the next token of each row of ``ids``, which is ``[rows, tokens]`` padded on the left."""
        device = self.settings.device
        output = model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            use_cache=False,
            logits_to_keep=1,
            static=cache,
        )
        return self._choose(output.logits[:, -1], requests, whole=len(ids) > len(requests))

    def _choose(self, logits: torch.Tensor, requests: list[int], whole: bool) -> list[int]:
        """Returns the next token of each row of ``[rows, vocab]``: the greedy one, or the one that is forced.

        Args:
            requests: whose rows these are, in order.
            whole: the rows are those of all requests by their number; others than ``requests`` do not matter.
        """
        if self.forced is not None:
            rows = logits[requests] if whole else logits
            forced = dict(zip(requests, force(rows, [self.forced[request] for request in requests]), strict=True))
            return [forced.get(row, 0) for row in range(len(logits))] if whole else list(forced.values())
        tokens = logits.argmax(-1)
        tensor = self.settings.tensor
        if tensor is not None:  # the leader's choice, even where another rank rounds differently
            torch.distributed.broadcast(tokens, tensor.leader, group=tensor.group)
        return tokens.tolist()


def prefill_groups(lengths: list[int], waste: float = 0.25) -> list[list[int]]:
    """Returns the rows of a batch in groups whose prompts are computed together, the longest first.

    Args:
        lengths: tokens of each prompt.
        waste: most padding in a group, as a share of its real tokens.
    """
    groups: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= (1 + waste) * (real + length):
            groups[-1].append(row)
            real += length
        else:
            groups.append([row])
            real = length
    return groups
