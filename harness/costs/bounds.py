"""What no engine exceeds on a machine: the time that the slowest of its resources needs for the work.

The three resources are taken to work at the same time and without a pause. Sources: the roofline model (Williams,
Waterman and Patterson, 2009) and, for the sum over the resources of a transformer's pass, NanoFlow (arXiv 2408.12757,
section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.basics.errors import UserError
from harness.config.schema import HardwareConfig
from harness.costs.lengths import Lengths
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork

# Of the data sheet's figure, what large matrix products and copies were measured to reach. A100: 260 of 312 TFLOP/s,
# which is what NanoFlow's optimum of 1857 tokens/s a GPU amounts to for 70e9 parameters; its peak was measured with
# CUTLASS. H100: 798 of 989 TFLOP/s (a product of 8192^3 in bfloat16) and 3.0 of 3.35 TB/s, measured for this project.
MATRIX_SHARE = 0.83
MEMORY_SHARE = 0.90
LARGEST_PASS = 8192  # tokens; a larger one saves no weight traffic worth the name
NAMES = {"compute": "compute", "memory": "memory bandwidth", "link": "interconnect"}


class Demand(NamedTuple):
    """What one device has to do."""

    flops: float  # floating-point operations
    memory: float  # bytes read and written in the device's memory
    link: float  # bytes sent to other devices

    def __add__(self, other: Demand) -> Demand:  # type: ignore[override]
        return Demand(*(a + b for a, b in zip(self, other, strict=True)))


class Rates(NamedTuple):
    """What one device can do in a second: FLOPs, bytes of its memory, bytes sent to other devices."""

    compute: float
    memory: float
    link: float

    def seconds(self, demand: Demand) -> dict[str, float]:
        """Returns the seconds of each resource, by the keys of :data:`NAMES`."""
        return {name: need / rate for name, need, rate in zip(self._fields, demand, self, strict=True)}


@dataclass(frozen=True, slots=True)
class Bound:
    """The shortest time of some work on all devices.

    Attributes:
        seconds: by resource.
        prompt_tokens, output_tokens: that the work makes progress by.
        sequences: of one replica, that are in a decode pass at once.
    """

    seconds: dict[str, float]
    prompt_tokens: int
    output_tokens: int
    sequences: float

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def elapsed_s(self) -> float:
        """Seconds of the resource that takes longest."""
        return self.seconds[self.binds]

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens a second, of all devices."""
        return (self.prompt_tokens + self.output_tokens) / self.elapsed_s

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens a second, of all devices."""
        return self.output_tokens / self.elapsed_s


def rates(hardware: HardwareConfig, dtype: str, tp: int, *, sheet: bool = False) -> Rates:
    """Returns what a device of ``hardware`` does in a second.

    Args:
        dtype: torch type that matrices are multiplied in; weights of fewer bits are unpacked to it.
        tp: ranks that share a model; where they are on several hosts, the hosts' link counts.
        sheet: take the data sheet's figures as they are, not what is reached of them (:data:`MATRIX_SHARE`,
            :data:`MEMORY_SHARE`). The interconnect's is the sheet's in both, since no measurement is at hand.

    Raises:
        UserError: a figure is missing.
    """
    across = hardware.devices_per_node is not None and tp > hardware.devices_per_node
    link = "node_bandwidth" if across else "interconnect_bandwidth"
    found = {
        f"peak_flops.{dtype}": hardware.peak_flops.get(dtype),
        "memory_bandwidth": hardware.memory_bandwidth,
        link: getattr(hardware, link) if tp > 1 else float("inf"),
    }
    for name, value in found.items():
        if not value:
            remedy = f"give hardware.{name}=NUMBER, or hardware= a machine whose data sheet is in conf/hardware"
            raise UserError(f"hardware.{name}", f"not known of {hardware.name}", remedy)
    compute, memory, sent = (float(value or 0) for value in found.values())
    matrix_share, memory_share = (1.0, 1.0) if sheet else (MATRIX_SHARE, MEMORY_SHARE)
    return Rates(compute * matrix_share, memory * memory_share, sent)


def demand(shape: ModelShape, work: PassWork, passes: float, tp: int) -> Demand:
    """Returns what one of ``tp`` devices has to do for ``work`` in so many passes, at least.

    FLOPs: 2 for each element of a matrix and token, for each element of the output projection and row of logits, and
    4 * heads * head_dim for each layer and pair of a token and a key that it sees (the product with the key, and with
    the value). Bytes: in each pass the weights of the layers and of the output projection once; of the KV cache what
    ``work`` reads, and each token's own, written. Activations are taken to stay in caches. Bytes sent: two all-reduces
    a layer (after attention and after the MLP) of ``hidden`` elements a token; a ring sends 2 * (tp - 1) / tp of the
    buffer from each device (Patarasuk and Yuan, 2009). A device has whole key/value heads.
    """
    attention = 4 * shape.layers * shape.heads * shape.head_dim * work.attention_pairs
    flops = 2 * shape.matmul * work.tokens + 2 * shape.head * work.logit_rows + attention
    weights = shape.matrix_bytes + shape.head * shape.element_bytes
    heads = -(-shape.kv_heads // tp) / shape.kv_heads
    cache = shape.kv_token_bytes * heads * (work.kv_read_tokens + work.tokens)
    reduced = 2 * shape.layers * work.tokens * shape.hidden * shape.element_bytes
    return Demand(flops / tp, passes * weights / tp + cache, reduced * 2 * (tp - 1) / tp)


def sequences_at_once(lengths: Lengths, cache_tokens: float) -> float:
    """Returns how many sequences are decoded at once, on average, in a KV cache of so many tokens.

    Each holds what it has been fed so far: the mean is over the decode steps of all requests.
    """
    work = lengths.decode()
    mean = work.kv_read_tokens / work.tokens if work.tokens else lengths.mean_held()
    return max(1.0, min(len(lengths.items), cache_tokens / mean))


def bounds(shape: ModelShape, lengths: Lengths, rate: Rates, tp: int, dp: int, cache_tokens: float) -> dict[str, Bound]:
    """Returns the bounds for ``prefill`` and ``decode`` alone and for the dataset's ``mix`` of both.

    Prompts need a pass for each :data:`LARGEST_PASS` tokens, decode steps one for each set of sequences that a replica
    has in its KV cache at once; in the mix they share passes. Each replica has its part of the requests.

    Args:
        cache_tokens: of one replica.
    """
    prefill, decode = lengths.prefill(), lengths.decode()
    sequences = sequences_at_once(lengths, cache_tokens)
    prompt_passes = max(1.0, prefill.tokens / LARGEST_PASS / dp)
    decode_passes = decode.tokens / sequences / dp
    mix = PassWork(*(a + b for a, b in zip(prefill, decode, strict=True)))
    parts = {
        "prefill": (prefill, prompt_passes, lengths.prompt_tokens, 0),
        "decode": (decode, decode_passes, 0, lengths.output_tokens - len(lengths.items)),
        "mix": (mix, max(mix.tokens / LARGEST_PASS / dp, decode_passes), lengths.prompt_tokens, lengths.output_tokens),
    }
    found = {}
    for name, (work, passes, prompt, output) in parts.items():
        if work.tokens:
            share = PassWork(*(count / dp for count in work))  # type: ignore[arg-type]
            found[name] = Bound(rate.seconds(demand(shape, share, passes, tp)), prompt, output, sequences)
    return found


def typical_pass(lengths: Lengths, tokens: int, sequences: float) -> PassWork:
    """Returns a full pass of ``tokens`` with the dataset's mix of prompt and decode tokens.

    Args:
        sequences: that there are to decode, at most.
    """
    prefill, decode = lengths.prefill(), lengths.decode()
    decodes = min(round(tokens * decode.tokens / (prefill.tokens + decode.tokens)), int(sequences))
    prompt = tokens - decodes
    context = decode.kv_read_tokens / decode.tokens if decode.tokens else 0
    ends = prompt * len(lengths.items) / prefill.tokens  # prompts that are through with this pass
    return PassWork(
        tokens,
        prompt,
        decodes,
        sequences=decodes + max(1, round(ends)),
        logit_rows=decodes + round(ends),
        kv_read_tokens=round(decodes * context) + prompt,
        attention_pairs=round(decodes * context + prompt * prefill.attention_pairs / prefill.tokens),
    )
