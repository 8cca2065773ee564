"""DeepSpeed-MII's pipeline (deepspeed-mii 0.3.3): what a user of DeepSpeed would run, made fit for measuring.

Scheduler, forward pass, sampler and stop rules are MII's own. What would make a count wrong or lose a token is put
right in :mod:`harness.engines.mii.pipeline`.
"""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from harness.basics.clock import Clock
from harness.basics.errors import UserError, one_line
from harness.engines.base import Engine, Progress, rejection
from harness.engines.mii.config import MiiConfig
from harness.engines.mii.pipeline import RequestPipeline, TokenIds, load_inference_engine
from harness.engines.mii.settings import (
    USE_FASTGEN,
    device_memory,
    end_of_sequence,
    lay_out,
    local_checkpoint,
    model_settings,
    refuse_unsupported,
)
from harness.engines.shared import deepspeed_ops
from harness.engines.shared.kv_blocks import refusal
from harness.engines.shared.order import arranged
from harness.engines.statistics import EngineStatistics
from harness.models.ends import Ends
from harness.models.tokenizer import load_tokenizer
from harness.ranks.rank import free_port
from harness.workload.records import Completion, PassRecord, Request


class MiiEngine(Engine[MiiConfig]):
    """Requests through :class:`RequestPipeline`, admitted only while the KV cache can hold them to their ends."""

    pipeline: RequestPipeline

    @property
    def kernels(self) -> str:
        return "mii"

    @property
    def limits(self) -> dict[str, int]:
        engine = self.settings.engine
        return {"token_budget": engine.token_budget, "max_sequences": engine.max_sequences}

    @property
    def provable(self) -> bool:
        return False  # it gives tokens, no logits: ``verify=N`` compares those

    def load(self) -> None:
        """Loads the checkpoint with MII; raises UserError for one that it cannot run."""
        from deepspeed.inference.v2.logging import inference_logger

        settings, tensor = self.settings, self.settings.tensor
        source = local_checkpoint(settings)
        refuse_unsupported(settings, source)
        try:
            deepspeed_ops.load(deepspeed_ops.RAGGED, settings.leads)
        except deepspeed_ops.OpsError as error:
            raise UserError("engine", f"mii: DeepSpeed's kernels cannot be built: {error}", USE_FASTGEN) from error
        self.tokenizer = load_tokenizer(settings.source)
        self.ends = Ends.of(end_of_sequence(source, settings), settings.generation, self.tokenizer)
        port = free_port()
        port = tensor.share(port) if tensor else port
        tokens = TokenIds(source.architecture["vocab_size"])
        inference_logger(level=logging.WARNING)  # the first call decides; DeepSpeed's own would ask for more
        with tempfile.TemporaryDirectory(prefix="harness-mii-") as directory:
            lay_out(source, settings.dtype, Path(directory))
            memory = device_memory(settings, source)
            asked = model_settings(settings, directory, tokens, memory, port, free_port())
            try:
                inference_engine, config = load_inference_engine(asked)
            except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
                if "Insufficient memory" in str(error):
                    raise MemoryError(str(error)) from error
                found = f"mii cannot load {source.path}: {one_line(str(error) or type(error).__name__, 300)}"
                raise UserError("engine", found, USE_FASTGEN) from error
        self.pipeline = RequestPipeline(inference_engine, tokens, config, settings.engine.max_sequences)
        if tensor is not None:
            self.pipeline.meet(tensor)
        self.notes.append("mii: MII's top-p pass left out, prompts admitted as the KV cache has room to their ends")

    def warm_up(self) -> None:
        """Runs two prompts, of a full pass if the context allows, and some decodes, on made-up tokens."""
        if not self.settings.leads:
            self.follow()
            return
        slots = self.pipeline.usable_blocks * self.pipeline.block_size
        length = min(slots - 4, (self.settings.max_context or slots) - 4, self.settings.engine.token_budget)
        requests = [Request(uid, "", 4, prompt_ids=(1,) * length) for uid in range(2 if length > 0 else 0)]
        for _ in self._run(requests, Clock(), frozenset()):
            pass

    def arrange(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the requests as ``engine.order`` says."""
        return arranged(requests, self.settings.engine.order)

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields completions as MII finishes them; see :meth:`Engine.generate`."""
        return self._run(requests, clock, self.ends.ids)

    def follow(self) -> None:
        """Computes the leader's batches, which MII itself sends, until the leader says that it is done."""
        while not self.pipeline.generate():
            pass

    def _run(self, requests: Iterable[Request], clock: Clock, stops: frozenset[int]) -> Iterator[Completion]:
        pipeline, settings = self.pipeline, self.settings
        self.statistics = EngineStatistics(
            steps=0,
            preemptions=0,
            recomputed_tokens=0,
            dropped_tokens=0,
            kv_blocks=pipeline.total_blocks,
            kv_peak_utilisation=0.0,
        )
        pipeline.clock, pipeline.on_pass = clock, self._account
        pipeline.steps = pipeline.prompt_tokens = pipeline.output_tokens = 0
        self._tokens = 0
        intake = iter(requests)
        ready: deque[tuple[Request, list[int]]] = deque()
        # MII looks at every request it knows before each pass: it is told of few that cannot start yet.
        most = settings.engine.max_sequences + min(settings.engine.max_sequences, settings.lookahead)
        more = True
        while True:
            while ready or more:
                if not ready:
                    taken = list(islice(intake, settings.lookahead))
                    more = len(taken) == settings.lookahead
                    yield from self._tokenize(taken, ready, clock)
                    continue
                request, ids = ready[0]
                if len(pipeline.active) >= most or not pipeline.has_room(len(ids), request.output_len or 1):
                    break
                ready.popleft()
                pipeline.submit(request, ids, stops)
            if not pipeline.active:
                break
            pipeline.backlog = len(ready)
            pipeline.generate()
            for entry in pipeline.finished:
                last = len(entry.token_ids) - 1
                yield self.completion(
                    entry.request.index,
                    entry.prompt_tokens,
                    entry.token_ids,
                    self.ends.reason(entry.token_ids, last) or "length",
                    entry.first_token_s,
                    clock,
                )
            pipeline.finished.clear()
        pipeline.end()
        if self.statistics.steps:
            self.statistics.mean_tokens_per_pass = self._tokens / self.statistics.steps

    def _tokenize(
        self, requests: list[Request], ready: deque[tuple[Request, list[int]]], clock: Clock
    ) -> Iterator[Completion]:
        """Adds requests and their prompts' ids to ``ready``; yields the rejections."""
        for request, ids in zip(requests, self.tokenize(requests), strict=True):
            assert request.output_len is not None
            reason = self.too_long(len(ids), request.output_len) or refusal(
                len(ids), request.output_len, self.pipeline.block_size, self.pipeline.usable_blocks
            )
            if reason:
                yield rejection(request, reason, clock)
            else:
                ready.append((request, ids))

    def _account(self, done: PassRecord) -> None:
        statistics, pipeline = self.statistics, self.pipeline
        statistics.steps = done.step
        statistics.prefill_s += done.seconds * done.prompt_tokens / done.tokens
        statistics.decode_s += done.seconds * done.decode_tokens / done.tokens
        statistics.peak_sequences = max(statistics.peak_sequences or 0, done.sequences)
        statistics.kv_peak_utilisation = max(statistics.kv_peak_utilisation or 0.0, done.kv_utilisation or 0.0)
        self._tokens += done.tokens
        self.on_pass(done)
        running = len(pipeline.active) - pipeline.waiting
        counts = (pipeline.prompt_tokens, pipeline.output_tokens)
        self.on_progress(Progress(running, done.waiting or 0, done.kv_utilisation, *counts))
