"""Dynamic SplitFuse: which tokens go into the next pass.

Every pass has room for ``token_budget`` tokens. All running decodes go in first, one token each, with drafts behind it
where there are any (:mod:`harness.engines.fastgen.drafts`); prompts fill the rest, a long one split over several
passes, short ones composed. The forward pass costs by the number of its tokens, not of its sequences, and its
throughput is concave in that number, so full and equal passes are the fastest way through a list of requests (Holmes et
al., "DeepSpeed-FastGen", 2024).

A device need not wait for its host: the next pass can be scheduled once this one is launched, before its ids have
come. Until then a placeholder stands for each of them.

Plain Python: no torch, no device, no clock. A pass costs O(running sequences), whatever waits behind them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as SequenceOf

from harness.engines.fastgen.batch import Chunk, RaggedBatch, Sequence
from harness.engines.fastgen.drafts import Drafter
from harness.engines.shared.kv_blocks import KvBlocks, refusal
from harness.models.ends import Ends

NO_ENDS = Ends()


class Scheduler:
    """Owns admission, chunking, preemption and finishing.

    A pass goes through :meth:`schedule`, :meth:`launched` and :meth:`collect`. One more pass may be scheduled and
    launched before a pass is collected.

    It cannot deadlock: a sequence is accepted only if the whole pool can hold it to its end; it is
    admitted only with blocks for all its present tokens; and when a decode finds no free block, the
    youngest running sequence gives its own back, so the oldest always moves on.

    Where blocks can be shared, a sequence is admitted with those that hold the beginning of its prompt, but never its
    last token, whose logits are wanted. They are whole blocks of prompts, which no later pass writes, and can be found
    once the pass that fills them is launched: what reads them is launched after it, and a device computes in order.

    Args:
        token_budget: most tokens in one pass.
        max_sequences: most sequences running at a time, at most ``token_budget``.
        blocks: the KV cache's blocks; :class:`SharedKvBlocks` to share them.
        ends: what ends a sequence before its length does.
        drafter: what drafts; None for no drafts. With one, a pass is collected before the next is scheduled.
    """

    def __init__(
        self,
        token_budget: int,
        max_sequences: int,
        blocks: KvBlocks,
        ends: Ends = NO_ENDS,
        drafter: Drafter | None = None,
    ) -> None:
        if not 1 <= max_sequences <= token_budget:
            raise ValueError(f"max_sequences {max_sequences} must be from 1 to the token budget {token_budget}")
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.blocks = blocks
        self.ends = ends
        self.drafter = drafter
        self.waiting: deque[Sequence] = deque()
        # Oldest admission first. At most the last one is still on its prompt (or recomputes it): a prompt that does not
        # end in a pass has taken all the room that was left in it.
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []  # by the latest schedule(), their cache contents void
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.shared_prompt_tokens = 0  # see Sequence.shared
        self.dropped_tokens = 0  # fed after an end that was not known yet
        self.peak_sequences = 0
        self._slots = list(range(max_sequences))  # the free ones; ascending, hence already a heap

    def refusal(self, prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Returns why a request could never run in this cache, or None when it can."""
        return refusal(prompt_tokens, max_new_tokens, self.blocks.block_size, self.blocks.total)

    def submit(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue; raises ValueError for one that :meth:`refusal` refuses."""
        reason = self.refusal(sequence.prompt_len, sequence.max_new_tokens)
        if reason or not sequence.tokens or sequence.max_new_tokens < 1:
            raise ValueError(reason or "a sequence needs a prompt and room for one token")
        sequence.keys = self.blocks.keys(sequence.tokens)
        self.waiting.append(sequence)

    @property
    def unfinished(self) -> int:
        """Sequences submitted that need another pass, for all that is known."""
        return len(self.running) + len(self.waiting)

    @property
    def unused_rows(self) -> int:
        """Ids that passes gave so far and that no sequence has: after its end, or after a draft that does not hold."""
        return self.dropped_tokens + (0 if self.drafter is None else self.drafter.drafted - self.drafter.accepted)

    def hungry(self, requests: int) -> bool:
        """Whether more should be submitted: fewer than ``requests`` wait, or fewer tokens than two passes take."""
        if len(self.waiting) < requests:
            return True
        missing = 2 * self.token_budget
        for sequence in self.waiting:
            missing -= len(sequence.tokens)
            if sequence.keys:
                missing += len(self._found(sequence)) * self.blocks.block_size
            if missing <= 0:
                return False
        return True

    def schedule(self) -> RaggedBatch:
        """Returns the next pass; empty only when nothing is left to do."""
        self.preempted = []
        grown = self._grow()
        running = self.running
        prompts = running[-1:] if running and _on_its_prompt(running[-1]) else []
        decodes = len(running) - len(prompts)
        chunks: list[Chunk] = [(sequence, sequence.computed, 1, True) for sequence in running[:decodes]]
        room = self.token_budget - decodes
        # Drafts first: one that holds saves a turn. But they leave prompts half of the room.
        drafted = 0 if self.drafter is None else self.drafter.extend(chunks, room // 2, self.blocks.block_size)
        room -= drafted
        for sequence in prompts:
            room -= _append_chunk(sequence, room, chunks)
        if not self.preempted:  # or the cache would be filled again at once by what was just thrown out
            room = self._admit(room, chunks, grown)
        self.peak_sequences = max(self.peak_sequences, len(running))
        return RaggedBatch(chunks, decodes, self.token_budget - decodes - drafted - room, grown, drafted)

    def launched(self, batch: RaggedBatch) -> None:
        """Books a pass that was launched: its tokens are as good as computed, its ids are placeholders.

        Sequences whose last token is among those ids stop running, and their blocks are free for the next pass, which
        the device begins after this one.
        """
        row, ended = 0, False
        for sequence, start, length, _ in batch.chunks[batch.decode_tokens :]:
            if sequence.keys:
                self.blocks.publish(sequence.blocks, sequence.keys, start, start + length)
        # How far decodes with drafts are computed only the ids tell.
        for sequence, start, length, last in batch.chunks[batch.decode_tokens if batch.draft_tokens else 0 :]:
            sequence.computed = computed = start + length
            if last:
                row -= 1
                sequence.tokens.append(row)
                if computed + 1 == sequence.most_tokens:
                    self._stop(sequence)
                    ended = True
        if ended:
            self.running = [sequence for sequence in self.running if sequence.slot >= 0]

    def collect(self, batch: RaggedBatch, token_ids: SequenceOf[int]) -> list[Sequence]:
        """Puts a pass's ids in the places kept for them and returns the sequences that it has finished, in its order.

        Of a sequence that the pass before has ended, unknown when this one was launched, the id is dropped.

        Args:
            batch: the oldest one that was launched and not collected.
            token_ids: what follows each of ``batch.sampled``, in order.
        """
        if batch.rows != len(token_ids):
            raise ValueError(f"{len(token_ids)} tokens for {batch.rows} rows")
        decodes = batch.chunks[: batch.decode_tokens]
        if self.drafter is not None and batch.draft_tokens:
            decodes, token_ids = self.drafter.settle(decodes, token_ids, self.ends)
        rows = decodes + [chunk for chunk in batch.chunks[batch.decode_tokens :] if chunk[3]]
        finished = []
        ends, watched = self.ends, self.ends.watched
        for (sequence, start, length, _), token in zip(rows, token_ids, strict=True):
            if sequence.finish_reason is not None:
                self.dropped_tokens += 1
                continue
            place = start + length
            sequence.tokens[place] = token
            if token in watched and (reason := ends.reason(sequence.tokens, place)) is not None:
                sequence.finish_reason = reason
                self._end_early(sequence, place)
            elif place + 1 == sequence.most_tokens:
                sequence.finish_reason = "length"
                if sequence.slot >= 0:  # its last ids were drafts
                    self._stop(sequence)
            else:
                continue
            finished.append(sequence)
        if finished and (watched or batch.draft_tokens):
            self.running = [sequence for sequence in self.running if sequence.slot >= 0]
        return finished

    def complete(self, batch: RaggedBatch, token_ids: SequenceOf[int]) -> list[Sequence]:
        """Books a pass that was computed at once: :meth:`launched` and :meth:`collect`."""
        self.launched(batch)
        return self.collect(batch, token_ids)

    def _stop(self, sequence: Sequence) -> None:
        """Takes back what a running sequence holds; the caller takes it out of ``running``."""
        self.blocks.give_back(sequence.blocks)
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot = -1

    def _end_early(self, sequence: Sequence, place: int) -> None:
        """Ends a sequence with the token at ``place``, whatever a pass that is under way will add."""
        del sequence.tokens[place + 1 :]
        if sequence.slot >= 0:
            self._stop(sequence)
        elif sequence in self.preempted:  # when its end was not known yet
            self.waiting.remove(sequence)
            self.preemptions -= 1
            self.recomputed_tokens -= place

    def _grow(self) -> list[Sequence]:
        """Gives a block to each running decode that needs one, the oldest first, and returns those that got one."""
        blocks, running = self.blocks, self.running
        block_size = blocks.block_size
        grown = []
        for sequence in [one for one in running if not one.computed % block_size]:
            if sequence.slot < 0:
                break  # preempted, and so is all that is younger
            if sequence.computed < len(sequence.blocks) * block_size:
                continue  # it has blocks for all of its prompt
            while not blocks.free and running[-1] is not sequence:
                self._preempt(running.pop())
            if not blocks.free:
                self._preempt(running.pop())
                break
            sequence.blocks += blocks.take(1)
            grown.append(sequence)
        return grown

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the head of the queue, keeping its tokens but not its cache."""
        self._stop(sequence)
        self.preemptions += 1
        self.recomputed_tokens += sequence.computed
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preempted.append(sequence)

    def _admit(self, room: int, chunks: list[Chunk], grown: list[Sequence]) -> int:
        """Admits waiting sequences while tokens, sequences and blocks allow; returns the room left."""
        while room and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._hold(sequence):
                break
            self.waiting.popleft()
            sequence.slot = heapq.heappop(self._slots)
            self.running.append(sequence)
            grown.append(sequence)
            room -= _append_chunk(sequence, room, chunks)
        return room

    def _hold(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence blocks for all of its tokens; returns whether there are enough."""
        blocks = self.blocks
        found = self._found(sequence)
        needed = blocks.needed(len(sequence.tokens)) - len(found)
        # One block of headroom for each that runs already: each may ask for one within block_size passes.
        if needed + blocks.idle(found) + len(self.running) > blocks.free and self.running:
            return False
        sequence.blocks += blocks.hold(found) + blocks.take(needed)
        sequence.computed = len(found) * blocks.block_size
        if sequence.shared is None:
            sequence.shared = sequence.computed
            self.shared_prompt_tokens += sequence.computed
        else:  # it was preempted, and this was to be computed again
            self.recomputed_tokens -= sequence.computed
        return True

    def _found(self, sequence: Sequence) -> list[int]:
        """Returns the blocks that hold the beginning of a waiting sequence, but never its last token."""
        return self.blocks.find(sequence.keys[: (len(sequence.tokens) - 1) // self.blocks.block_size])


def _on_its_prompt(sequence: Sequence) -> bool:
    """Whether more than its newest token has to be fed, or that one is still of the prompt."""
    return sequence.computed < max(sequence.prompt_len, len(sequence.tokens) - 1)


def _append_chunk(sequence: Sequence, room: int, chunks: list[Chunk]) -> int:
    """Appends as much of a prompt as there is room for, and returns how many tokens that is."""
    start = sequence.computed
    left = len(sequence.tokens) - start
    length = min(left, room)
    chunks.append((sequence, start, length, length == left))
    return length
