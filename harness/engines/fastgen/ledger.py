"""What the passes of a run add up to: statistics, records of passes, progress, when first tokens came."""

from __future__ import annotations

from harness.engines.base import Engine, Progress
from harness.engines.fastgen.loop import Computed
from harness.engines.fastgen.scheduler import Scheduler
from harness.workload.records import PassRecord


class Ledger:
    """The books of one :meth:`Engine.generate`, in the engine's statistics once they are closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first_token_s: dict[int, float] = {}  # of the requests under way, by index
        self._steps = self._tokens = self._prompt_tokens = self._output_tokens = 0

    def book(self, computed: Computed) -> None:
        """Books a pass and tells who watches."""
        engine, batch, state = self._engine, computed.batch, computed.state
        work, seconds = batch.work, computed.ended_s - computed.started_s
        self._steps += 1
        self._tokens += work.tokens
        self._output_tokens += computed.rows
        engine.statistics.prefill_s += seconds * work.prompt_tokens / work.tokens
        engine.statistics.decode_s += seconds * work.decode_tokens / work.tokens
        for sequence, _, _, last in batch.chunks[batch.decode_tokens :]:
            # Recomputed tokens were counted when they were first fed.
            if last and sequence.uid not in self._first_token_s:
                self._first_token_s[sequence.uid] = computed.ended_s
                self._prompt_tokens += sequence.prompt_len
        engine.on_pass(
            PassRecord(
                step=self._steps,
                started_s=computed.started_s,
                seconds=seconds,
                kv_utilisation=state.kv_utilisation,
                waiting=state.waiting,
                draft_tokens=batch.draft_tokens,
                **work._asdict(),
            )
        )
        engine.on_progress(
            Progress(state.running, state.waiting, state.kv_utilisation, self._prompt_tokens, self._output_tokens)
        )

    def first_token_s(self, index: int) -> float:
        """Returns when the first token of a request came that has finished, and forgets it."""
        return self._first_token_s.pop(index)

    def close(self, scheduler: Scheduler) -> None:
        """Completes the statistics once all requests are done."""
        statistics = self._engine.statistics
        statistics.steps = self._steps
        statistics.preemptions = scheduler.preemptions
        statistics.recomputed_tokens = scheduler.recomputed_tokens
        statistics.dropped_tokens = scheduler.dropped_tokens
        statistics.shared_prompt_tokens = scheduler.shared_prompt_tokens
        drafter = scheduler.drafter
        statistics.draft_tokens = 0 if drafter is None else drafter.drafted
        statistics.accepted_draft_tokens = 0 if drafter is None else drafter.accepted
        statistics.kv_peak_utilisation = scheduler.blocks.peak / scheduler.blocks.total
        statistics.peak_sequences = scheduler.peak_sequences
        statistics.mean_tokens_per_pass = self._tokens / self._steps if self._steps else None
