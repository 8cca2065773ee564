"""What no engine exceeds on a machine: the time that the slowest of its resources needs for the work.

The three resources are taken to work at the same time and without a pause. Sources: the roofline model (Williams,
Waterman and Patterson, 2009) and, for the sum over the resources of a transformer's pass, NanoFlow (arXiv 2408.12757,
section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.lengths import Lengths
from harness.costs.roofline import Roofline
from harness.costs.shape import ModelShape
from harness.costs.work import PassWork

# Of the data sheet's figure, what large matrix products and copies were measured to reach. A100: 260 of 312 TFLOP/s,
# which is what NanoFlow's optimum of 1857 tokens/s a GPU amounts to for 70e9 parameters; its peak was measured with
# CUTLASS. H100: 798 of 989 TFLOP/s (a product of 8192^3 in bfloat16) and 3.0 of 3.35 TB/s (a copy), measured for this
# project. The interconnect's figure is the sheet's, since no measurement is at hand.
MATRIX_SHARE = 0.83
MEMORY_SHARE = 0.90
LARGEST_PASS = 8192  # tokens; a larger one saves no weight traffic worth the name
COMPUTE, MEMORY, LINK = "compute", "memory bandwidth", "interconnect"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one of the devices that share a model can do at best.

    Attributes:
        roofline: seconds of each kind of work at the data sheet's figures.
        tp: devices that share the model.
        peak, bandwidth: FLOP/s and bytes/s of the sheet.
        matrix_share, memory_share: what is reached of them; all of a CPU's, whose figures are measured.
    """

    roofline: Roofline
    tp: int
    peak: float
    bandwidth: float
    matrix_share: float
    memory_share: float

    @classmethod
    def of(cls, shape: ModelShape, hardware: HardwareConfig, dtype: str, tp: int) -> Limits:
        """Returns the limits of a device of ``hardware``; matrices are multiplied in ``dtype``, unpacked if packed.

        Raises:
            UserError: a figure of the hardware is not known.
        """
        roofline = Roofline.of(shape, hardware, dtype, tp)
        shares = (1.0, 1.0) if hardware.accelerator is Accelerator.cpu else (MATRIX_SHARE, MEMORY_SHARE)
        peak, bandwidth = float(hardware.peak_flops[dtype] or 0), float(hardware.memory_bandwidth or 0)
        return cls(roofline, tp, peak, bandwidth, *shares)

    def seconds(self, work: PassWork, passes: float = 1.0) -> dict[str, float]:
        """Returns what each resource of a device takes for ``work`` in so many passes, at least.

        FLOPs: those of :class:`Roofline`. Bytes: in each pass the weights of the layers and of the output projection
        once; of the KV cache what ``work`` reads, and each token's own, written. Activations are taken to stay in
        caches. The output projection may be shared among the devices, though not every engine does.
        """
        unit = self.roofline
        compute = unit.matrix * work.tokens + unit.row / self.tp * work.logit_rows + unit.pair * work.attention_pairs
        memory = passes * (unit.weights + unit.head / self.tp) + unit.key * (work.kv_read_tokens + work.tokens)
        return {
            COMPUTE: compute / self.matrix_share,
            MEMORY: memory / self.memory_share,
            LINK: unit.exchange * work.tokens,
        }

    def flops(self, work: PassWork) -> float:
        """Returns the floating-point operations of one device."""
        return self.seconds(work)[COMPUTE] * self.matrix_share * self.peak

    def bytes(self, work: PassWork) -> float:
        """Returns the bytes that one device moves in its memory in one pass."""
        return self.seconds(work)[MEMORY] * self.memory_share * self.bandwidth


@dataclass(frozen=True, slots=True)
class Bound:
    """The shortest time of some work on all devices.

    Attributes:
        seconds: by resource.
        prompt_tokens, output_tokens: that the work makes progress by.
    """

    seconds: dict[str, float]
    prompt_tokens: int
    output_tokens: int

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


def sequences_at_once(lengths: Lengths, cache_tokens: float, most: int | None = None) -> float:
    """Returns how many sequences are decoded at once, on average, in a KV cache of so many tokens.

    Each holds what it has been fed so far: the mean is over the decode steps of all requests.

    Args:
        most: sequences that the engine runs at once.
    """
    work = lengths.decode
    mean = work.kv_read_tokens / work.tokens if work.tokens else lengths.mean_held
    found = min(len(lengths.items), cache_tokens / mean)
    return max(1.0, found if most is None else min(found, most))


def bounds(limits: Limits, lengths: Lengths, dp: int, sequences: float) -> dict[str, Bound]:
    """Returns the bounds for ``prefill`` and ``decode`` alone and for the dataset's ``mix`` of both.

    Prompts need a pass for each :data:`LARGEST_PASS` tokens, decode steps one for each set of sequences that a replica
    has in its KV cache at once, and at least as many as the longest output has tokens; in the mix they share passes.
    Each replica has its part of the requests.

    Args:
        sequences: of a replica, that are decoded at once.
    """
    prefill, decode = lengths.prefill, lengths.decode
    mix = PassWork(*(a + b for a, b in zip(prefill, decode, strict=True)))
    sequences = min(sequences, len(lengths.items) / dp)
    decode_passes = max(decode.tokens / dp / sequences, max(length.output for length in lengths.items) - 1)
    parts = {
        "prefill": (prefill, 0.0, lengths.prompt_tokens, 0),
        "decode": (decode, decode_passes, 0, decode.tokens),
        "mix": (mix, decode_passes, lengths.prompt_tokens, lengths.output_tokens),
    }
    found = {}
    for name, (work, passes, prompt, output) in parts.items():
        if work.tokens:
            passes = max(1.0, work.tokens / dp / LARGEST_PASS, passes)
            seconds = limits.seconds(work, passes * dp)
            found[name] = Bound({one: value / dp for one, value in seconds.items()}, prompt, output)
    return found


def typical_pass(lengths: Lengths, budget: int, sequences: float) -> PassWork:
    """Returns a pass as they are when prompts and decode steps come as the dataset has them.

    Every pass decodes one token of each running sequence, and prompts come in as sequences end: the pass has as many
    prompt tokens a decode step as the dataset. A pass is therefore not full where the sequences are too few.

    Args:
        budget: tokens of a pass, at most.
        sequences: that are decoded at once, at most.
    """
    prefill, decode = lengths.prefill, lengths.decode
    share = decode.tokens / (prefill.tokens + decode.tokens)
    tokens = budget if not share else max(1, min(budget, round(sequences / share)))
    decodes = round(tokens * share)
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
