"""What a rank needs of memory, what it finds, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.costs.lengths import CHARACTERS_A_TOKEN, text_of
from harness.costs.shape import ModelShape
from harness.workload.records import Request

SEQUENCES = 8  # of the longest request's size that a useful KV cache holds
LOGIT_BYTES = 4  # logits are compared in float32


@dataclass(frozen=True, slots=True)
class Memory:
    """What the ranks find on one host.

    Attributes:
        size: bytes of one device, or of the host's memory that is free; None where nobody knows.
        shared: whether the ranks of the host have ``size`` together, as on a CPU.
        own: bytes that each rank takes before it loads a model.
        bound: bytes that each of 1, 2, ... ranks finds in the NUMA nodes that it is bound to, the poorest of them; as
            far as ranks are bound.
    """

    size: int | None
    shared: bool
    own: int
    bound: tuple[int, ...] = ()

    def of_rank(self, ranks: int) -> int:
        """Returns the bytes that one of ``ranks`` of the host finds; ``size`` is known."""
        assert self.size is not None
        if not self.shared or ranks == 1:  # a lone rank is bound to nothing
            return self.size
        share = self.size // ranks
        return near_bytes(share, self.bound[ranks - 1]) if ranks <= len(self.bound) else share

    def in_nodes(self, ranks: int) -> Memory:
        """Returns what each of ``ranks`` finds in its own NUMA nodes alone; ``bound`` has them."""
        assert self.size is not None
        return Memory(min(self.size // ranks, self.bound[ranks - 1]), False, self.own)


def near_bytes(share: int, near: int) -> int:
    """Returns the bytes that a rank which is bound to NUMA nodes reckons with.

    Args:
        share: of the host's memory, for each of its ranks.
        near: of the memory of its own nodes. Where others have filled these, the rest of the host's, slow as it is, is
            better than none.
    """
    return min(share, near) if 2 * near >= share else share


@dataclass(frozen=True, slots=True)
class Needs:
    """What one replica needs, in bytes.

    Attributes:
        sharded, whole: weights that tensor parallelism divides among the ranks, and those that each rank has.
        token: keys and values of one token, of all ``kv_heads``.
        tokens: of the KV cache that makes a replica useful (:func:`useful_tokens`).
        part: of what the weights leave free, that the engine makes its KV cache of.
        given: bytes of a rank's KV cache where the config says them: then these are useful, and what it takes.
        most: tokens that the engine ever holds at a time.
    """

    sharded: int
    whole: int
    token: int
    kv_heads: int
    tokens: int
    part: float = 1.0
    given: int | None = None
    most: int = 2**62

    def weights(self, tp: int) -> int:
        """Returns a rank's bytes of weights."""
        return -(-self.sharded // tp) + self.whole

    def useful(self, tp: int) -> int:
        """Returns a rank's bytes of a useful KV cache; a rank has whole heads."""
        return self.held(self.tokens, tp) if self.given is None else self.given

    def held(self, tokens: int, tp: int) -> int:
        """Returns a rank's bytes of the KV cache of so many tokens."""
        return tokens * self.token // self.kv_heads * -(-self.kv_heads // tp)

    def cache(self, left: int) -> int:
        """Returns the bytes of KV cache that the engine makes of what the weights have ``left``."""
        return int(self.part * left) if self.given is None else left


@dataclass(frozen=True, slots=True)
class Held:
    """What the memory of one rank goes to, in bytes.

    Attributes:
        size: of its device, or its part of the host's free memory.
        own: what the process takes for itself.
        weights, activations, cache: of the model, of the largest pass, of the KV cache that the engine makes.
        most_cache: of the largest KV cache that there is room for.
        token: of one token's keys and values.
    """

    size: int
    own: int
    weights: int
    activations: int
    cache: int
    most_cache: int
    token: int

    @property
    def left(self) -> int:
        """Bytes that nothing takes; negative where they are missing."""
        return self.size - self.own - self.weights - self.activations - self.cache

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.cache // self.token

    @property
    def most_tokens(self) -> int:
        """Tokens that the largest KV cache would hold."""
        return self.most_cache // self.token


def held(needs: Needs, memory: Memory, tp: int, ranks: int, activations: int) -> Held:
    """Returns what the memory of a rank goes to; ``memory.size`` is known.

    Args:
        ranks: of one host.
        activations: bytes of the largest pass of a rank (:func:`activation_bytes`).
    """
    size = memory.of_rank(ranks)
    weights, token, most = needs.weights(tp), max(1, needs.held(1, tp)), needs.held(needs.most, tp)
    left = max(0, size - memory.own - weights)
    cache = needs.given if needs.given is not None else min(most, int(needs.part * left))
    return Held(size, memory.own, weights, activations, cache, max(0, left - activations), token)


def activation_bytes(shape: ModelShape, tokens: int, rows: int, tp: int) -> int:
    """Returns the bytes of activations that a rank has at the widest moment of a pass: an estimate.

    Of each token there are the residual, its normalised copy and a block's result (3 * hidden elements), and inside a
    block either query, key, value and the attention's output or gate, up and their product, of which a rank has its
    part; after the layers, ``rows`` of logits, once in the type of the model and once in float32. Attention is taken to
    keep no scores (FlashAttention, arXiv 2205.14135). A library's own workspace is not in it.

    Args:
        tokens: of the pass.
        rows: of logits.
    """
    inside = max((2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim, 3 * shape.inner) / tp
    logits = rows * shape.vocab * (shape.element_bytes + LOGIT_BYTES)
    return int(tokens * (3 * shape.hidden + inside) * shape.element_bytes + logits)


def useful_tokens(requests: Sequence[Request], context: int | None, most: int) -> int:
    """Returns how many tokens of KV cache make a replica useful.

    Useful is a cache that holds the longest request of the dataset eight times over, or all requests where they are
    fewer or shorter than that: below some such number every pass reads all the weights for a handful of tokens, and
    sharing the model among more ranks, which leaves each of them more memory, is the better use of them. Prompts are
    not tokenized yet, so their length is the dataset's own claim or a guess from their characters.

    Args:
        context: longest prompt plus output of the model, None where it has no limit.
        most: tokens that the engine ever holds at a time.
    """
    lengths = []
    for request in requests:
        prompt = len(request.prompt_ids or ()) or request.claimed_prompt_len
        length = (prompt or len(text_of(request)) // CHARACTERS_A_TOKEN) + 1
        length += request.output_len or len(request.reply or "") // CHARACTERS_A_TOKEN
        lengths.append(length if context is None else min(length, context))
    longest = max(lengths, default=1)
    return max(longest, min(SEQUENCES * longest, sum(lengths), most))


def shortage(tp: int, ranks: int, memory: Memory, needs: Needs | None) -> str | None:
    """Returns what is missing for ``tp`` ranks to share a model; None when they have what they need, or nobody knows.

    Args:
        ranks: of one host.
    """
    if needs is None or memory.size is None:
        return None
    share = memory.of_rank(ranks)
    left = share - memory.own - needs.weights(tp)
    cache, useful = needs.cache(left), needs.useful(tp)
    if left > 0 and cache >= useful:
        return None
    gets = f", of which the cache gets {gib(cache)}" if left > 0 else ""
    return (
        f"a rank of tp={tp} needs {gib(needs.weights(tp))} of weights and {gib(useful)} of KV cache; "
        f"it has {gib(share)}{gets}"
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
