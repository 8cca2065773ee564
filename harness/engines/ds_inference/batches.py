"""A static batch computed to its end, pass by pass: with the model's own layers, or with DeepSpeed's injected ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from harness.engines.base import EngineSettings
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.ds_inference.kernel_inject import InjectedBatch
from harness.engines.ds_inference.static_cache import StaticCache
from harness.engines.scoring import Forced, force
from harness.models.ends import Ends


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward: what it computed, padding not counted, and the next token of each of ``rows``."""

    rows: list[int]
    tokens: list[int]
    prompt_tokens: int
    decode_tokens: int
    seconds: float


class Batches:
    """Computes batches on one rank; all that share a model compute the same ones.

    Attributes:
        engine: DeepSpeed's, around the model; set when that is loaded, as is ``ends``.
        graphed: with ``cuda_graph``, the buffers that the captured graph reads.
        injected: with ``kernel_inject``.
        forced: what the batch at hand is made to continue with, when it is scored.
    """

    engine: Any
    ends: Ends

    def __init__(self, settings: EngineSettings[DsInferenceConfig]) -> None:
        self.settings = settings
        self.graphed: StaticCache | None = None
        self.injected: InjectedBatch | None = None
        self.forced: list[Forced] | None = None

    @torch.inference_mode()
    def compute(self, prompts: list[list[int]], output_lens: list[int], forced: list[Forced] | None) -> Iterator[Pass]:
        """Computes a batch to its end, pass by pass; ``forced`` says which tokens come, and books their scores."""
        self.forced = forced
        if self.injected is not None:
            yield from self._compute_injected(self.injected, prompts, output_lens)
            return
        lengths = [len(prompt) for prompt in prompts]
        cache = self._cache(len(prompts), max(lengths) + max(output_lens))
        cache.start(lengths)
        tokens = [list(prompt) for prompt in prompts]  # and what has come

        def book(step: Pass) -> Pass:
            for request, token in zip(step.rows, step.tokens, strict=True):
                tokens[request].append(token)
            return step

        def finished(request: int) -> bool:
            return self.finished(tokens[request], lengths[request] + output_lens[request])

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
            positions = [len(tokens[request]) - 1 for request in rows]
            yield book(self._decode(cache, live, [tokens[request][-1] for request in rows], positions))

    def _compute_injected(
        self, batch: InjectedBatch, prompts: list[list[int]], output_lens: list[int]
    ) -> Iterator[Pass]:
        """The same with injected layers, which take all rows to the end."""
        started = time.perf_counter()
        live = list(range(len(prompts)))
        newest = self._choose(batch.prefill(prompts), live, whole=True)
        yield Pass(live, newest[: len(live)], sum(map(len, prompts)), 0, time.perf_counter() - started)
        tokens = [[*prompt, token] for prompt, token in zip(prompts, newest, strict=False)]
        most = [len(prompt) + output_len for prompt, output_len in zip(prompts, output_lens, strict=True)]
        while live := [row for row in live if not self.finished(tokens[row], most[row])]:
            started = time.perf_counter()
            newest = self._choose(batch.decode(newest), live, whole=True)
            for row in live:
                tokens[row].append(newest[row])
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

    def finished(self, tokens: list[int], most: int) -> bool:
        """Whether a request has come to its end.

        Args:
            tokens: its prompt and its output.
            most: how many these can be.
        """
        if len(tokens) >= most:
            return True
        return self.forced is None and self.ends.reason(tokens, len(tokens) - 1) is not None


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
