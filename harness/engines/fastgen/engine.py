"""FastGen's loop: schedule, forward, sample, finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import islice

from harness.basics.clock import Clock
from harness.engines.base import Engine, EngineSettings, EngineStatistics, Progress, rejection
from harness.engines.fastgen import scoring
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.fastgen.runners.sharded_runner import ShardedRunner
from harness.engines.fastgen.scheduler import RaggedBatch, Scheduler, Sequence
from harness.engines.scoring import Forced, Score, Scored, no_prefill
from harness.engines.shared.kv_blocks import KvBlocks
from harness.engines.shared.order import arranged
from harness.models import tokenizer
from harness.workload.records import Completion, PassRecord, Request

PROOF_BUDGET = 32  # tokens a pass of a proof


@dataclass(slots=True)
class _Active:
    """A request inside the engine, and when its first token came."""

    request: Request
    first_token_s: float | None = None


@dataclass(slots=True)
class _Counts:
    """What the passes of a run have added up to."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class FastGenEngine(Engine[FastGenConfig]):
    """Dynamic SplitFuse over a :class:`Runner`."""

    def __init__(self, settings: EngineSettings[FastGenConfig]) -> None:
        super().__init__(settings)
        self.runner, note = choice.choose(settings)
        self.notes += [note] if note else []
        self.team: ShardedRunner | None = None
        if settings.tensor is not None:
            self.team = self.runner = ShardedRunner(self.runner, settings.tensor)
        self.total_blocks = 0

    @property
    def kernels(self) -> str:
        return self.runner.name

    @property
    def provable(self) -> bool:
        # DeepSpeed's own loader draws dummy weights of its own, which nobody else has.
        return not (self.kernels == "deepspeed" and self.settings.source.kind == "dummy")

    @property
    def suspect(self) -> tuple[str, str, str]:
        """See :attr:`Engine.suspect`; kernels that are not PyTorch's have those to give way to."""
        if self.kernels == "torch":
            return super().suspect
        return "engine.kernels", self.kernels, "use engine.kernels=torch"

    def instead(self, reason: str) -> FastGenEngine | None:
        """Returns the engine with PyTorch's kernels where ``engine.kernels=auto`` has taken others."""
        engine = self.settings.engine
        if engine.kernels is not Kernels.auto or self.kernels == "torch" or engine.quantization is not None:
            return None
        other = FastGenEngine(replace(self.settings, engine=replace(engine, kernels=Kernels.torch)))
        other.notes.append(f"engine.kernels=auto took torch, not {self.kernels}: {reason}")
        return other

    @property
    def limits(self) -> dict[str, int]:
        engine = self.settings.engine
        return {"token_budget": engine.token_budget, "max_sequences": engine.max_sequences}

    def load(self) -> None:
        """Loads the model and makes the KV cache."""
        settings = self.settings.engine
        self.tokenizer = tokenizer.load_tokenizer(self.settings.source)
        self.runner.load()
        self.phase = "cache"
        context = self.settings.max_context
        per_sequence = -(-context // self.runner.block_size) if context else 1 << 20
        self.total_blocks = self.runner.allocate(settings.max_sequences * per_sequence)
        if self.runner.block_size != settings.kv_block_size:
            self.notes.append(
                f"the kernels' KV blocks are of {self.runner.block_size} tokens, not engine.kv_block_size"
            )

    def warm_up(self) -> None:
        """Runs a full prompt pass and some decodes on made-up tokens."""
        if not self.settings.leads:
            self.follow()
            return
        scheduler = self._scheduler(frozenset())
        context = self.settings.max_context or 1 << 20
        room = min(self.total_blocks * self.runner.block_size, context) - 4
        length = min(room, self.settings.engine.token_budget)
        for uid in range(min(2, self.settings.engine.max_sequences) if length > 0 else 0):
            scheduler.submit(Sequence(uid, [1] * length, length, 4))
        while scheduler.unfinished:
            batch = scheduler.schedule()
            for sequence in scheduler.preempted:
                self.runner.free(sequence)
            for sequence in scheduler.complete(batch, self._forward(batch)):
                self.runner.free(sequence)
        if self.team is not None:
            self.team.release()

    def follow(self) -> None:
        """Computes the leader's passes; see :meth:`Engine.follow`."""
        assert self.team is not None
        self.team.follow()

    def score(self, items: Iterable[Scored], prefill: bool = False) -> Iterator[Score]:
        """Yields scores as their sequences finish; see :meth:`Engine.score`."""
        if prefill and not self.runner.every_token:
            raise no_prefill(
                f"engine=fastgen with {self.kernels} kernels" + (" over several ranks" if self.team else "")
            )
        yield from self._score(items, prefill)
        if self.team is not None:
            self.team.release()

    def prove(self, items: SequenceOf[Scored]) -> Iterator[Score]:
        """Yields scores from passes so small that prompts are split and have others beside them."""
        split = PROOF_BUDGET * 4
        yield from self._score([item for item in items if len(item.context_ids) <= split], False, PROOF_BUDGET)
        yield from self._score([item for item in items if len(item.context_ids) > split], False)
        if self.team is not None:
            self.team.release()

    def _score(self, items: Iterable[Scored], prefill: bool, budget: int | None = None) -> Iterator[Score]:
        scheduler = self._scheduler(frozenset(), budget)

        def refusal(forced: Forced) -> str | None:
            context, target = len(forced.context), len(forced.target)
            return self.unscorable(forced) or scheduler.refusal(context, target)

        yield from scoring.score(self.runner, scheduler, items, refusal, self.settings.lookahead, prefill)

    def arrange(self, requests: SequenceOf[Request]) -> list[Request]:
        """Returns the requests as ``engine.order`` says."""
        return arranged(requests, self.settings.engine.order)

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields completions as their sequences finish; see :meth:`Engine.generate`."""
        self.statistics = EngineStatistics(kv_blocks=self.total_blocks)
        scheduler = self._scheduler(self.runner.stop_ids())
        intake = iter(requests)
        counts = _Counts()
        active: dict[int, _Active] = {}
        lookahead = self.settings.lookahead
        more = True
        while True:
            while more and len(scheduler.waiting) < lookahead:
                taken = list(islice(intake, lookahead))
                more = len(taken) == lookahead
                yield from self._submit(taken, scheduler, active, clock)
            if not scheduler.unfinished:
                break
            batch = scheduler.schedule()
            for sequence in scheduler.preempted:
                self.runner.free(sequence)
            started = clock()
            token_ids = self._forward(batch)
            ended = clock()
            finished = scheduler.complete(batch, token_ids)
            counts.output_tokens += len(token_ids)
            self._account(batch, scheduler, active, counts, started, ended)
            for sequence in finished:
                self.runner.free(sequence)
                yield self.completion(
                    sequence.uid,
                    sequence.prompt_len,
                    sequence.output_ids,
                    sequence.finish_reason or "length",
                    active.pop(sequence.uid).first_token_s,
                    clock,
                )
        if self.team is not None:
            self.team.release()
        self._sum_up(scheduler, counts)

    def _account(
        self,
        batch: RaggedBatch,
        scheduler: Scheduler,
        active: dict[int, _Active],
        counts: _Counts,
        started: float,
        ended: float,
    ) -> None:
        """Books a pass that took from ``started`` to ``ended``, and tells who watches."""
        statistics = self.statistics
        counts.steps += 1
        counts.tokens += batch.tokens
        statistics.prefill_s += (ended - started) * batch.prompt_tokens / batch.tokens
        statistics.decode_s += (ended - started) * batch.decode_tokens / batch.tokens
        for sequence, _, _, last in batch.chunks[batch.decode_tokens :]:
            # Recomputed tokens were counted when they were first fed.
            if last and (entry := active[sequence.uid]).first_token_s is None:
                entry.first_token_s = ended
                counts.prompt_tokens += sequence.prompt_len
        used = scheduler.blocks.used / scheduler.blocks.total
        self.on_pass(
            PassRecord(
                step=counts.steps,
                started_s=started,
                seconds=ended - started,
                kv_utilisation=used,
                waiting=len(scheduler.waiting),
                **batch.work._asdict(),
            )
        )
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        self.on_progress(Progress(running, waiting, used, counts.prompt_tokens, counts.output_tokens))

    def _sum_up(self, scheduler: Scheduler, counts: _Counts) -> None:
        """Completes the statistics once all requests are done."""
        statistics = self.statistics
        statistics.steps = counts.steps
        statistics.preemptions = scheduler.preemptions
        statistics.recomputed_tokens = scheduler.recomputed_tokens
        statistics.kv_peak_utilisation = scheduler.blocks.peak / scheduler.blocks.total
        statistics.peak_sequences = scheduler.peak_sequences
        statistics.mean_tokens_per_pass = counts.tokens / counts.steps if counts.steps else None

    def _scheduler(self, stop_ids: frozenset[int], budget: int | None = None) -> Scheduler:
        """Returns a new scheduler; ``budget`` lowers ``engine.token_budget``."""
        engine = self.settings.engine
        blocks = KvBlocks(self.total_blocks, self.runner.block_size)
        budget = min(budget or engine.token_budget, engine.token_budget)
        return Scheduler(budget, min(engine.max_sequences, budget), blocks, stop_ids)

    def _forward(self, batch: RaggedBatch) -> list[int]:
        rows = self.runner.forward(batch)
        return (rows.argmax(-1) if rows.ndim == 2 else rows).tolist()

    def _submit(
        self, requests: list[Request], scheduler: Scheduler, active: dict[int, _Active], clock: Clock
    ) -> Iterator[Completion]:
        """Tokenizes requests and queues them; yields the rejections."""
        for request, ids in zip(requests, self.tokenize(requests), strict=True):
            assert request.output_len is not None  # workload.resolve() has seen to it
            reason = self.too_long(len(ids), request.output_len) or scheduler.refusal(len(ids), request.output_len)
            if reason:
                yield rejection(request, reason, clock)
                continue
            active[request.index] = _Active(request)
            scheduler.submit(Sequence(request.index, ids, len(ids), request.output_len))
