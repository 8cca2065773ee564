"""FastGen: requests through the scheduler and a runner, completions back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from typing import Any

from harness.basics.clock import Clock
from harness.basics.errors import UserError
from harness.engines.base import Engine, EngineSettings, rejection
from harness.engines.fastgen import scoring
from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.drafts import Drafter
from harness.engines.fastgen.ledger import Ledger
from harness.engines.fastgen.loop import Loop
from harness.engines.fastgen.runners import choice
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.fastgen.runners.sharded_runner import ShardedRunner
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.fastgen.texts import Texts
from harness.engines.scoring import Forced, Score, Scored, no_prefill
from harness.engines.shared.kv_blocks import KvBlocks, KvPool, SharedKvBlocks
from harness.engines.shared.order import arranged
from harness.engines.statistics import EngineStatistics
from harness.models import tokenizer
from harness.models.ends import Ends
from harness.workload.records import Completion, Request

PROOF_BUDGET = 32  # tokens a pass of a proof


class FastGenEngine(Engine[FastGenConfig]):
    """Dynamic SplitFuse over a :class:`Runner`."""

    def __init__(self, settings: EngineSettings[FastGenConfig]) -> None:
        super().__init__(settings)
        self.runner, note = choice.choose(settings)
        self.notes += [note] if note else []
        self.automatic = settings.engine.kernels is Kernels.auto  # as what took its place is, which is named
        self.team: ShardedRunner | None = None
        if settings.tensor is not None:
            self.team = self.runner = ShardedRunner(self.runner, settings.tensor)
        self.total_blocks = 0

    @property
    def kernels(self) -> str:
        return self.runner.name

    @property
    def facts(self) -> dict[str, Any]:
        """Which instructions the native kernels compute with."""
        return (
            {"instruction_set": native_checks.instruction_set(self.settings.dtype)} if self.kernels == "native" else {}
        )

    @property
    def kv_pool(self) -> KvPool | None:
        return KvPool(self.total_blocks, self.runner.block_size) if self.total_blocks else None

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
        """Returns the engine with the next kernels where ``engine.kernels=auto`` has taken these."""
        engine = self.settings.engine
        if not self.automatic or engine.quantization is not None:
            return None
        for kernels in choice.after(self.kernels):
            try:
                other = FastGenEngine(replace(self.settings, engine=replace(engine, kernels=kernels)))
            except UserError:
                continue  # they cannot be had here
            other.automatic = True
            other.notes.append(f"engine.kernels=auto took {kernels.value}, not {self.kernels}: {reason}")
            return other
        return None

    @property
    def limits(self) -> dict[str, int]:
        engine = self.settings.engine
        return {"token_budget": engine.token_budget, "max_sequences": engine.max_sequences}

    def load(self) -> None:
        """Loads the model and makes the KV cache."""
        settings = self.settings.engine
        self.tokenizer = tokenizer.load_tokenizer(self.settings.source)
        self.runner.load()
        self.ends = Ends.of(self.runner.stop_ids(), self.settings.generation, self.tokenizer)
        self.phase = "cache"
        context = self.settings.max_context
        per_sequence = -(-context // self.runner.block_size) if context else 1 << 20
        self.total_blocks = self.runner.allocate(settings.max_sequences * per_sequence)
        if self.runner.block_size != settings.kv_block_size:
            self.notes.append(
                f"the kernels' KV blocks are of {self.runner.block_size} tokens, not engine.kv_block_size"
            )

    def warm_up(self) -> None:
        """Runs a full prompt pass, decodes beside another prompt, and decodes alone, on made-up tokens."""
        if not self.settings.leads:
            self.follow()
            return
        scheduler = self._scheduler(Ends())
        context = self.settings.max_context or 1 << 20
        room = min(self.total_blocks * self.runner.block_size, context) - 4
        length = min(room, self.settings.engine.token_budget)
        # A GPU's kernels are chosen by their rows; a CPU's are not, and one full pass has touched all memory.
        beside = min(length, 16) if self.settings.device == "cpu" else length
        prompts = [length, beside][: self.settings.engine.max_sequences] if length > 0 else []
        for uid, prompt in enumerate(prompts):
            scheduler.submit(Sequence(uid, [1] * prompt, prompt, 4))
        with self.runner.warming():
            for _ in Loop(self.runner, scheduler, Clock()).passes():
                pass
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
        scheduler = self._scheduler(Ends(), budget)

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
        scheduler = self._scheduler(self.ends, run=True)
        loop, ledger = Loop(self.runner, scheduler, clock), Ledger(self)
        device_time = self.runner.device_time
        if device_time is not None:
            device_time.begin()
        lookahead, beside = self.settings.lookahead, self.runner.depth > 0
        with Texts(self, requests, lookahead, beside, idle=lambda: not loop.under_way) as texts:

            def submit() -> None:
                while texts.more and scheduler.hungry(lookahead):
                    for request, ids in texts.take():
                        if rejected := self._submit(request, ids, scheduler, clock):
                            texts.add(rejected)

            for computed in loop.passes(submit):
                ledger.book(computed)
                for sequence in computed.finished:
                    texts.make(partial(self._complete, sequence, ledger.first_token_s(sequence.uid), clock))
                yield from texts.ready()
            yield from texts.ready(wait=True)
        if self.team is not None:
            self.team.release()
        ledger.close(scheduler)
        if device_time is not None and (busy := device_time.end()) is not None:
            self.statistics.device_busy_s, self.statistics.device_gap_s = busy.busy_s, busy.gap_s

    def _scheduler(self, ends: Ends, budget: int | None = None, run: bool = False) -> Scheduler:
        """Returns a new scheduler, whose blocks have no contents yet.

        Args:
            budget: lowers ``engine.token_budget``.
            run: whether prompts share blocks and tokens are drafted, where the config says so. Where tokens are scored
                they are not: each has to be computed, and is given.
        """
        engine = self.settings.engine
        pool = SharedKvBlocks if run and engine.prefix_sharing else KvBlocks
        blocks = pool(self.total_blocks, self.runner.block_size)
        budget = min(budget or engine.token_budget, engine.token_budget)
        drafter = Drafter(engine.draft_len) if run and engine.draft is not None else None
        return Scheduler(budget, min(engine.max_sequences, budget), blocks, ends, drafter)

    def _submit(self, request: Request, ids: list[int], scheduler: Scheduler, clock: Clock) -> Completion | None:
        """Queues a request; returns its rejection where it could never run."""
        assert request.output_len is not None  # workload.resolve() has seen to it
        reason = self.too_long(len(ids), request.output_len) or scheduler.refusal(len(ids), request.output_len)
        if reason:
            return rejection(request, reason, clock)
        scheduler.submit(Sequence(request.index, ids, len(ids), request.output_len))
        return None

    def _complete(self, sequence: Sequence, first_token_s: float, clock: Clock) -> Completion:
        """Returns what came of a request; :class:`Texts` books the time."""
        reason, ids = sequence.finish_reason or "length", sequence.output_ids
        prompt = sequence.tokens[: sequence.prompt_len]
        completion = self.completion(
            sequence.uid, sequence.prompt_len, ids, reason, first_token_s, clock, booked=False, prompt=prompt
        )
        completion.shared_tokens = sequence.shared if self.settings.engine.prefix_sharing else None
        return completion
