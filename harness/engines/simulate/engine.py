"""FastGen's scheduler over a model of how long a pass takes: the run of a machine that need not be there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from harness.basics.clock import Clock, VirtualClock
from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.costs.lengths import CHARACTERS_A_TOKEN, guessed_tokens, uncounted_tokens
from harness.costs.memory import gib
from harness.costs.pass_time import PassTime
from harness.costs.shape import ModelShape
from harness.engines.base import Described, Engine, EngineSettings, Progress, rejection
from harness.engines.shared.kv_memory import affordable_blocks
from harness.engines.shared.order import arranged
from harness.engines.simulate.config import SimulateConfig
from harness.engines.simulate.replay import Finished, Item, Pass, Replay, Replica, Setup
from harness.engines.simulate.tokens import drawn_length, stop_ids, token_ids
from harness.engines.statistics import EngineStatistics, merged_statistics
from harness.models.tokenizer import Encoding
from harness.workload.records import Completion, PassRecord, Request

NAP_S = 0.05  # the shortest sleep that keeps a run to its pace


class SimulateEngine(Engine[SimulateConfig]):
    """All replicas of a run, on a clock that is set and not measured."""

    def __init__(self, settings: EngineSettings[SimulateConfig]) -> None:
        super().__init__(settings)
        assert settings.described is not None
        self.machine: Described = settings.described
        self.tokenizer = self._encoded
        self.blocks = 0
        self.hazard: tuple[tuple[int, float], ...] = ()
        self._times: PassTime | None = None
        self._rank_bytes = 0

    @property
    def kernels(self) -> str:
        return "simulated"

    @property
    def provable(self) -> bool:
        return False

    @property
    def limits(self) -> dict[str, int]:
        engine = self.settings.engine
        return {"token_budget": engine.token_budget, "max_sequences": engine.max_sequences}

    @property
    def facts(self) -> dict[str, Any]:
        """What the simulation rests on, and which of its settings no measurement covers."""
        assert self._times is not None
        return {
            "simulation": {
                "hardware": self.machine.hardware.name,
                "figures": "data sheet" if self._times.fitted is None else "fit",
                "outside": list(self._times.outside),
                "eos_hazard": [list(pair) for pair in self.hazard],
                "counted": self.machine.encode is not None,
            },
        }

    def clock(self, already_s: float) -> Clock:
        """Returns a clock that the passes set."""
        return VirtualClock(already_s)

    def peak_memory_bytes(self) -> int:
        """Returns what a rank of the described machine would hold."""
        return self._rank_bytes

    def load(self) -> None:
        """Makes the sums of memory and time.

        Raises:
            UserError: the model does not fit, or its sizes or the machine's figures are not known.
        """
        settings, machine = self.settings, self.machine
        hardware = machine.hardware
        shape = ModelShape.of(settings.source.architecture, settings.dtype)
        engine, ranks = settings.engine, machine.host_ranks
        budget, sequences = engine.token_budget, engine.max_sequences
        self._times = PassTime(shape, hardware, settings.dtype, machine.tp, ranks, budget, sequences)
        self.blocks = self._affordable_blocks()
        self.hazard = self._hazard(self._times, shape)
        if machine.encode is None:
            self.notes.append(
                "no tokenizer.json at hand: prompts are as long as the dataset says, "
                f"or a token for {CHARACTERS_A_TOKEN} characters"
                + (", and those that are texts share no blocks" if engine.prefix_sharing else "")
            )
        if not self.hazard and settings.generation.stop is Stop.eos:
            self.notes.append("no engine.eos_rate is given, or fitted for this model: every output runs to output_len")
        if settings.generation.stop_strings or settings.generation.stop_token_ids:
            self.notes.append("a simulation has no text: stop_strings and stop_token_ids end none of its outputs")

    def warm_up(self) -> None:
        """Nothing has to be warm."""

    def arrange(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the requests as ``engine.order`` says."""
        return arranged(requests, self.settings.engine.order)

    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields completions as their sequences finish; see :meth:`Engine.generate`."""
        assert isinstance(clock, VirtualClock) and self._times is not None
        everything = list(requests)
        items: dict[int, Item] = {}
        for item, request in zip(self._items(everything), everything, strict=True):
            if reason := self.too_long(item.prompt_tokens, item.max_new_tokens):
                yield rejection(request, reason, clock)
            else:
                items[request.index] = item
        by_index = {request.index: request for request in everything if request.index in items}
        replay = Replay(items.values(), self._setup(clock()), self._times)
        first = replay.replicas[0]
        fed = made = 0
        prefill_s, decode_s = [0.0] * self.machine.dp, [0.0] * self.machine.dp
        pace = _Pace(self.settings.engine.pace, clock())
        for event in replay:
            if isinstance(event, Pass):
                number, work = event.replica, event.work
                made += work.logit_rows
                fed += work.prompt_tokens
                prefill_s[number] += event.seconds * work.prompt_tokens / work.tokens
                decode_s[number] += event.seconds * work.decode_tokens / work.tokens
                if number == 0:  # as in a real run, whose rank 0 writes its own passes
                    self.on_pass(_record(event, first.steps))
                self.on_progress(Progress(event.running, event.waiting, event.kv_utilisation, fed, made))
                clock.now_s = max(clock.now_s, event.started_s + event.seconds)
                pace.wait(clock.now_s)
                continue
            clock.now_s = max(clock.now_s, event.finished_s)
            if isinstance(event, Finished):
                yield self._completed(event, items[event.uid])
            else:
                yield rejection(by_index[event.uid], event.reason, clock)
        clock.now_s = max([clock.now_s, *(replica.ended_s for replica in replay.replicas)])
        self.played = [
            (one.ended_s, _statistics(one, *times))
            for one, *times in zip(replay.replicas, prefill_s, decode_s, strict=True)
        ]
        self.statistics = merged_statistics([statistics for _, statistics in self.played])

    def _completed(self, event: Finished, item: Item) -> Completion:
        architecture = self.settings.source.architecture
        eos = event.finish_reason == "eos"
        ids = token_ids(event.uid, event.output_tokens, eos, architecture["vocab_size"], stop_ids(architecture))
        return Completion(
            index=event.uid,
            prompt_tokens=item.prompt_tokens,
            output_tokens=event.output_tokens,
            finish_reason=event.finish_reason,
            token_ids=ids,
            text="",
            first_token_s=event.first_token_s,
            finished_s=event.finished_s,
            shared_tokens=event.shared_tokens if self.settings.engine.prefix_sharing else None,
        )

    def _setup(self, started_s: float) -> Setup:
        engine = self.settings.engine
        return Setup(
            token_budget=engine.token_budget,
            max_sequences=engine.max_sequences,
            block_size=engine.kv_block_size,
            blocks=self.blocks,
            replicas=self.machine.dp,
            lookahead=self.settings.lookahead,
            started_s=started_s,
            prefix_sharing=engine.prefix_sharing,
        )

    def _items(self, requests: list[Request]) -> Iterator[Item]:
        """Yields what the scheduler has to know of each request."""
        texts = [request.prompt for request in requests if request.prompt_ids is None]
        encode, shared = self.machine.encode, self.settings.engine.prefix_sharing
        encoded = iter(encode(texts) if encode is not None and texts else [])
        for request in requests:
            assert request.output_len is not None  # workload.resolve() has seen to it
            ids: Sequence[int] | None = request.prompt_ids
            if ids is None and encode is not None:
                ids = next(encoded)
            prompt_tokens = uncounted_tokens(request) if ids is None else len(ids)
            ends = drawn_length(self.machine.seed, request.index, self.hazard) or request.output_len
            known = None if ids is None or not shared else tuple(ids)
            yield Item(request.index, prompt_tokens, request.output_len, min(ends, request.output_len), known)

    def _encoded(self, texts: list[str]) -> Encoding:
        """Returns, in place of ids, as many numbers as each text has tokens: what is asked of them is their count."""
        encode = self.machine.encode
        counts = map(guessed_tokens, texts) if encode is None else map(len, encode(texts))
        return Encoding([range(count) for count in counts])

    def _affordable_blocks(self) -> int:
        """Returns the blocks of a replica's KV cache, as a real engine makes them once its weights are loaded.

        Raises:
            UserError: the weights do not fit, or the cache does not hold one block.
        """
        engine, machine = self.settings.engine, self.machine
        needs = machine.needs
        if machine.memory.size is None:
            remedy = "give the bytes of a device"
            raise UserError("hardware.memory_bytes", f"{machine.hardware.name} does not say them", remedy)
        assert needs is not None  # or its shape would not be known
        share = machine.memory.of_rank(machine.host_ranks)
        weights = needs.weights(machine.tp)
        free = share - machine.memory.own - weights
        if free <= 0:
            found = f"{machine.tp}: a rank has {gib(share)} on {machine.hardware.name}, its weights take {gib(weights)}"
            raise UserError(
                "parallel.tp", found, "use more ranks a model (parallel=auto finds how many), or a smaller one"
            )
        block_bytes = needs.held(engine.kv_block_size, machine.tp)
        context = self.settings.max_context
        a_sequence = -(-context // engine.kv_block_size) if context else 1 << 20
        most = engine.max_sequences * a_sequence
        blocks = affordable_blocks(engine.kv_memory, free, most, engine.kv_block_size, block_bytes)
        self._rank_bytes = machine.memory.own + weights + blocks * block_bytes
        return blocks

    def _hazard(self, times: PassTime, shape: ModelShape) -> tuple[tuple[int, float], ...]:
        """Returns the chance that a token ends its sequence, by position; empty where outputs run to their ends."""
        given, fitted = self.settings.engine.eos_rate, times.fitted
        if self.settings.generation.stop is not Stop.eos:
            return ()
        if isinstance(given, int | float):
            return ((1, float(given)),)
        if given is None or fitted is None or not fitted.is_of(shape):
            return ()
        return fitted.eos_hazard


class _Pace:
    """Keeps a run to so many real seconds for a simulated one."""

    def __init__(self, pace: float, started_s: float) -> None:
        self._pace, self._from_s = pace, started_s
        self._started = time.monotonic()

    def wait(self, clock_s: float) -> None:
        """Sleeps until the clock may be at ``clock_s``."""
        if self._pace:
            ahead = (clock_s - self._from_s) * self._pace - (time.monotonic() - self._started)
            if ahead > NAP_S:
                time.sleep(ahead)


def _record(event: Pass, step: int) -> PassRecord:
    return PassRecord(
        step=step,
        started_s=event.started_s,
        seconds=event.seconds,
        kv_utilisation=event.kv_utilisation,
        waiting=event.waiting,
        draft_tokens=0,
        **event.work._asdict(),
    )


def _statistics(replica: Replica, prefill_s: float, decode_s: float) -> EngineStatistics:
    scheduler = replica.scheduler
    return EngineStatistics(
        steps=replica.steps,
        preemptions=scheduler.preemptions,
        recomputed_tokens=scheduler.recomputed_tokens,
        dropped_tokens=scheduler.dropped_tokens,
        shared_prompt_tokens=scheduler.shared_prompt_tokens,
        draft_tokens=0,
        accepted_draft_tokens=0,
        kv_blocks=scheduler.blocks.total,
        kv_peak_utilisation=scheduler.blocks.peak / scheduler.blocks.total,
        peak_sequences=scheduler.peak_sequences,
        mean_tokens_per_pass=replica.tokens / replica.steps if replica.steps else None,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )
