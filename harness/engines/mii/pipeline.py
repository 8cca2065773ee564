"""DeepSpeed-MII's pipeline (deepspeed-mii 0.3.3), made fit for measuring by subclassing.

:class:`RequestPipeline` says on which lines of MII it relies.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.basics.errors import UserError
from harness.engines.mii.settings import generation_settings
from harness.engines.shared.kv_blocks import blocks_at_end
from harness.ranks.tensor_parallel import TensorParallel
from harness.workload.records import PassRecord, Request

try:
    from mii.batching import MIIPipeline
    from mii.batching.constants import TOP_P_NAME
    from mii.batching.data_classes import RequestBatch
    from mii.config import ModelConfig
    from mii.constants import GenerationFinishReason
    from mii.modeling.models import load_model
    from mii.modeling.tokenizers import MIITokenizerWrapper
except ImportError as error:
    found = f"mii is not installed, or not all of it ({error})"
    raise UserError("engine", found, "run bash launch/install_mii.sh") from error


def load_inference_engine(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Returns DeepSpeed's engine with the model that MII has loaded, and MII's config of it.

    Args:
        settings: see :func:`harness.engines.mii.settings.model_settings`.
    """
    config = ModelConfig(**settings)
    return load_model(config), config


class TokenIds(MIITokenizerWrapper):
    """In MII's place for a tokenizer: prompts come as ids, and what was generated leaves as ids.

    Args:
        vocab_size: of the model: MII drops the logits beyond it, so the tokenizer's, often smaller, will not do.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None)
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """How many logits take part in the choice of a token."""
        return self._vocab_size

    @property
    def eos_token_id(self) -> int:
        """No id at all: what ends a sequence is passed with each request."""
        return -1

    def encode(self, input: Sequence[int]) -> Tensor:
        """Returns the ids as MII wants them, int64 ``[tokens]`` on the host."""
        return torch.tensor(input, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Never called: text is made from ids by the harness's own tokenizer."""
        raise NotImplementedError

    def convert_tokens_to_ids(self, input: str) -> int:
        """Returns the id that :func:`generation_settings` wrote as a text."""
        return int(input)


@dataclass(slots=True)
class Entry:
    """A request inside the pipeline.

    Attributes:
        blocks: KV blocks that it holds at its end.
        begun: whether any of its prompt has been computed.
        first_token_s: on the pipeline's clock.
        token_ids: the engine's own, the end-of-sequence id among them; empty until it is finished.
    """

    request: Request
    prompt_tokens: int
    blocks: int
    begun: bool = False
    first_token_s: float | None = None
    token_ids: list[int] = field(default_factory=list)


class RequestPipeline(MIIPipeline):
    """MII's pipeline, to which requests are added one at a time while others run.

    Relied on, in ``mii/batching/ragged_batching.py`` of 0.3.3:

    - ``generate`` (104): one round: broadcast, flush, ``put``, ``_process_logits``, ``_generate_output`` of each
      finished request, ``schedule_requests``. So a flush that ``_generate_output`` queues takes effect before
      anything that is submitted after the round can be scheduled.
    - ``_process_logits`` (200) returns when the tokens are on the host; ``seq_length`` is up to date by then.
    - ``_generate_output`` (222) sees the end-of-sequence id in ``next_token``; ``accumulate_generated_token``
      has left it out of ``generated_tokens``.
    - ``reset_request_status`` (378) moves generated tokens into the prompt when the KV cache runs dry.
    - ``make_request`` (420) always adds a top-p pass, which sorts the vocabulary, to ``post_processing``.
    - ``_schedule_token_gen`` (256) and ``_schedule_prompts`` (279) take a pass's most sequences from
      ``max_ragged_sequence_count``. DeepSpeed has by then made its buffers as long as that, those of attention atoms
      among them, which long prompts need more of (:func:`attention_atoms`): they are made longer, and the limit is put
      back to ``max_sequences`` here.
    - ``__call__`` (567): its end is :meth:`end`. The rest of it cannot be used: it has one ``max_new_tokens`` for
      all its prompts, and one prompt that is too long fails them all.

    Args:
        inference_engine: DeepSpeed's ``InferenceEngineV2``.
        tokenizer: a :class:`TokenIds`.
        model_config: a ``mii.config.ModelConfig``.
        max_sequences: most sequences of a pass.
    """

    scheduled_requests: Any

    def __init__(self, inference_engine: Any, tokenizer: TokenIds, model_config: Any, max_sequences: int) -> None:
        super().__init__(inference_engine=inference_engine, tokenizer=tokenizer, model_config=model_config)
        inference_engine._config.state_manager.max_ragged_sequence_count = max_sequences
        self.clock: Callable[[], float] = time.perf_counter  # gives the times of passes and first tokens
        self.on_pass: Callable[[PassRecord], None] = lambda record: None
        self.block_size = min(group.block_size for group in inference_engine.model().kv_cache_config())
        self.total_blocks = int(min(inference_engine.free_blocks))
        # MII feeds no prompt while no block is free, not even the rest of one whose last block has room.
        self.usable_blocks = self.total_blocks - 1
        self.active: dict[int, Entry] = {}
        self.finished: list[Entry] = []
        self.reserved = 0  # blocks of all active requests at their ends
        self.waiting = 0  # active requests of which nothing has been computed
        self.backlog = 0  # requests that are ready to become active
        self.steps = self.prompt_tokens = self.output_tokens = 0
        self._put_at = 0.0
        # Collected with its socket open, a context waits for ever.
        weakref.finalize(self, _close, self.socket, self._zmq_context)

    def blocks_needed(self, prompt_tokens: int, output_len: int) -> int:
        """Returns the KV blocks that a request holds at its end."""
        return blocks_at_end(prompt_tokens, output_len, self.block_size)

    def has_room(self, prompt_tokens: int, output_len: int) -> bool:
        """Whether the KV cache can hold this request, and all active ones, to their ends."""
        return self.reserved + self.blocks_needed(prompt_tokens, output_len) <= self.usable_blocks

    def submit(self, request: Request, prompt_ids: Sequence[int], stops: frozenset[int]) -> None:
        """Hands a request, for which :meth:`has_room`, to MII's queue."""
        assert request.output_len is not None  # workload.resolve() has seen to it
        entry = Entry(request, len(prompt_ids), self.blocks_needed(len(prompt_ids), request.output_len))
        kwargs = generation_settings(len(prompt_ids), request.output_len, stops)
        self.request_queue.put(self.make_request(self.tid, request.index, self.tokenizer.encode(prompt_ids), kwargs))
        self.active[request.index] = entry
        self.reserved += entry.blocks
        self.waiting += 1

    def make_request(self, tid: int, uid: int, input_tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        """Returns MII's request without its top-p pass, which never changes the largest logit and costs a sort."""
        request = super().make_request(tid, uid, input_tokens, kwargs)
        request.post_processing = [name for name in request.post_processing if not name.startswith(TOP_P_NAME)]
        return request

    def put(self, uids: list[int], tokenized_input: list[Tensor]) -> Tensor:
        """Starts a forward pass; returns the logits ``[sequences, vocab]``."""
        self._put_at = self.clock()
        return super().put(uids, tokenized_input)

    def _process_logits(self, next_token_logits: Tensor, running_requests: Any) -> tuple[Tensor, Tensor]:
        result = super()._process_logits(next_token_logits, running_requests)
        ended = self.clock()
        prompt_tokens = decode_tokens = 0
        for request in running_requests:
            generated, entry = request.num_generated_tokens, self.active[request.uid]
            self.waiting -= not entry.begun
            entry.begun = True
            if generated > 1:
                decode_tokens += 1
            else:  # 0 in the middle of a prompt
                prompt_tokens += len(request.input_tokens)
            self.output_tokens += generated > 0
            if generated == 1:
                entry.first_token_s = ended
                self.prompt_tokens += entry.prompt_tokens
        self.steps += 1
        self.on_pass(
            PassRecord(
                step=self.steps,
                started_s=self._put_at,
                seconds=ended - self._put_at,
                tokens=prompt_tokens + decode_tokens,
                prompt_tokens=prompt_tokens,
                decode_tokens=decode_tokens,
                sequences=len(running_requests),
                kv_utilisation=1 - int(min(self.inference_engine.free_blocks)) / self.total_blocks,
                waiting=self.waiting + self.backlog,
            )
        )
        return result

    def _generate_output(self, r: Any) -> None:
        """Keeps a finished request's ids, in place of putting them into a result queue."""
        entry = self.active.pop(r.uid)
        entry.token_ids = [int(token) for token in r.generated_tokens]
        if r.finish_reason == GenerationFinishReason.STOP:
            entry.token_ids.append(int(r.next_token))
        if r.prompt_length != entry.prompt_tokens or r.num_generated_tokens != len(entry.token_ids):
            raise RuntimeError(
                f"request {r.uid}: {entry.prompt_tokens} prompt tokens were fed and {len(entry.token_ids)} came back, "
                f"MII counts {r.prompt_length} and {r.num_generated_tokens}"
            )
        self.reserved -= entry.blocks
        self.finished.append(entry)
        self._queue_flush_request(r.uid)

    def reset_request_status(self) -> None:
        """Never reached while :meth:`has_room` is asked; MII's own would move generated tokens into a prompt."""
        raise RuntimeError(
            f"MII can schedule none of its {len(self.buffer)} requests: {self.reserved} of {self.usable_blocks} "
            f"KV blocks are promised, {int(min(self.inference_engine.free_blocks))} are free"
        )

    def end(self) -> None:
        """Releases what is finished, and ends the other ranks' loop."""
        self._bcast_requests(force=True)
        self.flush(self.scheduled_requests.requests_to_flush.uids)
        self.scheduled_requests = RequestBatch()

    def meet(self, tensor: TensorParallel) -> None:
        """Returns when the other ranks hear the leader; all of them call it.

        A publisher drops what it sends before a subscriber is connected; MII waits a second and hopes.
        """
        heard = False
        while not tensor.least(int(heard)):
            if tensor.leads:
                self.socket.send_string(json.dumps({"data": [], "force": False}))  # to MII, an empty batch
                heard = True
            else:
                heard = bool(self.socket.poll(100))  # milliseconds


def _close(socket: Any, context: Any) -> None:
    socket.close(linger=0)
    context.term()
