"""What every engine is: load once, warm up, then turn requests into completions as they finish."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from harness.basics.clock import Clock
from harness.basics.errors import UserError
from harness.config.schema import EngineConfig, GenerationConfig, HardwareConfig
from harness.costs.memory import Memory, Needs
from harness.engines.scoring import Forced, Score, Scored
from harness.engines.statistics import EngineStatistics
from harness.machine import memory
from harness.models.ends import Ends
from harness.workload.records import Completion, PassRecord, Request

if TYPE_CHECKING:
    from harness.engines.shared.kv_blocks import KvPool
    from harness.machine.numa import Place
    from harness.models.source import Source
    from harness.models.token_counts import Encoder
    from harness.ranks.tensor_parallel import TensorParallel

SCORING = "use engine=fastgen, ds_inference or baseline"
C = TypeVar("C", bound=EngineConfig)  # an engine's own keys


@dataclass(frozen=True, slots=True)
class Described:
    """The machine and the ranks of a run that is only simulated, all of them by one process.

    Attributes:
        tp, dp: ranks that share a model, and replicas.
        memory: what its ranks find.
        needs: of memory, of a replica; None where the model's sizes are not known.
        encode: texts into ids, as the model's tokenizer does; None where that is not at hand.
        seed: of what is drawn.
    """

    hardware: HardwareConfig
    tp: int
    dp: int
    host_ranks: int
    memory: Memory
    needs: Needs | None
    encode: Encoder | None
    seed: int


@dataclass(frozen=True, slots=True)
class EngineSettings(Generic[C]):
    """All an engine is told.

    Attributes:
        dtype: name of the torch type of weights and activations, resolved (never ``auto``).
        device: torch device of this rank, ``cpu`` or ``cuda:N``.
        max_context: longest prompt plus output in tokens; None where the model states none.
        held_tokens: about how many the KV cache holds at most in this run; 0 where nobody knows.
        lookahead: requests taken from the queue at a time, before they can start.
        tensor: the ranks that share this engine's model; None when it has the model to itself.
        host_ranks: ranks on this host, which share its memory where the device is the CPU.
        place: the cores and NUMA nodes that this rank is bound to; None for none.
        described: of a run that is simulated; None where this process computes.
    """

    engine: C
    generation: GenerationConfig
    source: Source
    dtype: str
    device: str
    max_context: int | None = None
    held_tokens: int = 0
    lookahead: int = 256
    tensor: TensorParallel | None = None
    host_ranks: int = 1
    place: Place | None = None
    described: Described | None = None

    @property
    def tp(self) -> int:
        """Ranks that share this engine's model, itself among them."""
        return 1 if self.tensor is None else self.tensor.size

    @property
    def quantization(self) -> str | None:
        """How the weights are packed, by the engine's own key; None where they are not, or it has no such key."""
        return getattr(self.engine, "quantization", None)

    @property
    def leads(self) -> bool:
        """Whether this rank takes requests: it has its model to itself, or leads those that share it."""
        return self.tensor is None or self.tensor.leads


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run between two passes, for whoever watches."""

    running: int
    waiting: int
    kv_utilisation: float | None
    prompt_tokens: int
    output_tokens: int


class Engine(ABC, Generic[C]):
    """One way to run the job. Knows nothing of files, Hydra, or ranks other than its own."""

    def __init__(self, settings: EngineSettings[C]) -> None:
        self.settings = settings
        self.tokenizer: Any = None
        self.ends = Ends()  # of a request; load() makes them
        self.statistics = EngineStatistics()
        # Where this process plays several replicas: when each ended, in seconds of the clock, and what it did.
        self.played: list[tuple[float, EngineStatistics]] = []
        self.phase = "load"  # "cache" while load() makes the KV cache: what to lower if memory runs out
        self.notes: list[str] = []  # what the record should say about choices made while loading
        self.proof: dict[str, Any] | None = None  # how it was compared with the model (harness.engines.proof.proof)
        self.on_pass: Callable[[PassRecord], None] = lambda record: None
        self.on_progress: Callable[[Progress], None] = lambda progress: None

    @property
    @abstractmethod
    def kernels(self) -> str:
        """Name of what computes the forward pass, for the record."""

    @property
    def provable(self) -> bool:
        """Whether its passes are to be compared with Hugging Face's model before the clock."""
        return True

    @property
    def suspect(self) -> tuple[str, str, str]:
        """What to blame if they differ: the field, its value, and the way out."""
        name = self.settings.engine.name
        if self.settings.tp > 1:
            return "parallel.tp", f"{self.settings.tp}: engine={name} does not compute this model", "use parallel.tp=1"
        return "model", f"engine={name} does not compute it as Hugging Face does", "use engine=baseline"

    def instead(self, reason: str) -> Engine[C] | None:
        """Returns the engine to take where this one's passes differ from the model's; None if there is none."""
        return None

    @property
    def limits(self) -> dict[str, int]:
        """The settings that bound a pass, for the record; empty for an engine that has none."""
        return {}

    @property
    def kv_pool(self) -> KvPool | None:
        """The blocks of the KV cache that this rank has loaded; None where there are none."""
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What else the record should say of what was loaded."""
        return {}

    def clock(self, already_s: float) -> Clock:
        """Returns the clock that times a run, started; ``already_s``: seconds that earlier segments of it took."""
        return Clock(already_s)

    def peak_memory_bytes(self) -> int:
        """Returns the most memory (bytes) that this rank has held."""
        return memory.peak_memory_bytes(self.settings.device)

    @abstractmethod
    def load(self) -> None:
        """Loads tokenizer and weights onto the device, this rank's share of them under tensor parallelism.

        Raises UserError for what the user can mend.
        """

    @abstractmethod
    def warm_up(self) -> None:
        """Runs each kind of pass once, so that compiling and first-touch costs stay outside the clock.

        All ranks that share a model call it together.
        """

    def arrange(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the requests in the order in which they should be handed to :meth:`generate`."""
        return list(requests)

    def encode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the prompts' ids; prompts that came as ids stay what they are."""
        texts = [request.prompt for request in requests if request.prompt_ids is None]
        encoded = iter(self.tokenizer(texts).input_ids if texts else [])
        return [next(encoded) if request.prompt_ids is None else list(request.prompt_ids) for request in requests]

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def tokenize(self, requests: Sequence[Request]) -> list[list[int]]:
        """Does what :meth:`encode` does, and books the time."""
        started = time.perf_counter()
        prompts = self.encode(requests)
        self.statistics.tokenize_s += time.perf_counter() - started
        return prompts

    def completion(
        self,
        index: int,
        prompt_tokens: int,
        token_ids: list[int],
        finish_reason: str,
        first_token_s: float | None,
        clock: Clock,
        booked: bool = True,
        prompt: Sequence[int] = (),
    ) -> Completion:
        """Returns what came of a request, its text made from ``token_ids``; books the time, unless the caller does.

        Args:
            prompt: its ids, where a stop string may have begun in them.
        """
        started = time.perf_counter()
        text = self.ends.text(self.decode, prompt, token_ids)
        if booked:
            self.statistics.detokenize_s += time.perf_counter() - started
        return Completion(
            index=index,
            prompt_tokens=prompt_tokens,
            output_tokens=len(token_ids),
            finish_reason=finish_reason,
            token_ids=token_ids,
            text=text,
            first_token_s=first_token_s,
            finished_s=clock(),
        )

    @abstractmethod
    def generate(self, requests: Iterable[Request], clock: Clock) -> Iterator[Completion]:
        """Yields one completion a request, rejected ones included, in the order of finishing.

        Args:
            requests: pulled as the engine has room, so that a shared queue can stand behind it.
            clock: seconds since the start of the run, for ``first_token_s`` and ``finished_s``.
        """

    def score(self, items: Iterable[Scored], prefill: bool = False) -> Iterator[Score]:
        """Yields one score an item, those that cannot be computed included, in the order of finishing.

        What computes them are the kernels of :meth:`generate`, in passes like its own: contexts as prompts, and each
        token of a target by a decode step. The last token is not fed.

        Args:
            prefill: feed targets as prompts too, which is faster.

        Raises:
            FloatingPointError: the model's logits are not numbers.
            UserError: this engine cannot score, or not so.
        """
        raise UserError("engine", f"{self.settings.engine.name} cannot score given tokens", SCORING)

    def prove(self, items: Sequence[Scored]) -> Iterator[Score]:
        """Yields scores of a proof's few short items, in passes that leave nothing out which a run's passes do."""
        return self.score(items)

    def follow(self) -> None:
        """Computes the leader's passes on the other ranks that share its model, until what the leader began ends.

        In place of :meth:`generate`, :meth:`score` or :meth:`prove`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no tensor parallelism")

    def too_long(self, prompt_tokens: int, output_len: int) -> str | None:
        """Returns why a request cannot run on this model, or None when it can."""
        limit = self.settings.max_context
        if prompt_tokens == 0:
            return "the prompt has no tokens"
        if limit is not None and prompt_tokens + output_len > limit:
            return f"prompt of {prompt_tokens} tokens + output_len {output_len} exceeds the model's context of {limit}"
        return None

    def unscorable(self, forced: Forced) -> str | None:
        """Returns why no engine could score this on this model, or None; the last token is never fed."""
        if not forced.target:
            return "there are no tokens to score"
        if not forced.context:
            return "there is no token before the first to be scored"
        fed, limit = len(forced.context) + len(forced.target) - 1, self.settings.max_context
        if limit is not None and fed > limit:
            return f"its {fed} tokens exceed the model's context of {limit}"
        return None


def rejection(request: Request, reason: str, clock: Clock) -> Completion:
    """Returns the completion that stands for a request which was not run."""
    return Completion(
        index=request.index,
        prompt_tokens=0,
        output_tokens=0,
        finish_reason="rejected",
        token_ids=[],
        text="",
        first_token_s=None,
        finished_s=clock(),
        error=reason,
    )
