"""How long a forward pass takes, and the host between two passes.

A pass is the sum of what its kinds of work take, each the roofline's time (FLOPs over the peak, bytes over the
bandwidth) times a factor that says how far the kernels are from it, and of times that no data sheet has: launches, each
sequence, each all-reduce. Matrix products read their weights while they multiply: neither hides the other wholly, so
the two times are joined by a p-norm, which is their maximum for a large ``norm`` and their sum for 1. (The roofline:
Williams, Waterman and Patterson, 2009. A class-wise sum of it with efficiencies fitted to measured passes: Vidur,
arXiv 2405.05465, and LLMCompass, arXiv 2312.03134, do likewise.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from harness.basics.errors import UserError
from harness.config.schema import Accelerator, HardwareConfig
from harness.costs.shape import ModelShape

# Elements that a layer reads and writes for a token beside its products: two norms (2 each), two residual sums (3 each)
# of the hidden size, and the MLP's gate times up (3) of the inner size.
HIDDEN_MOVED, INNER_MOVED = 10, 3
CPU_LINK = 4  # ranks on a host without a figure for the link exchange through memory: written, read, added, written


@dataclass(frozen=True, slots=True)
class Factors:
    """What the times of a pass are multiplied with, and times in seconds (``_s``).

    Attributes:
        matrices, weights: of the layers' products, and of reading their weights; 1 is the hardware's figure.
        norm: how the two are joined, at least 1.
        head: of the output projection, of which both are joined in the same way.
        attention, kv: of attention's products, and of reading keys and values.
        pointwise: of what is read and written for norms, residual sums and the like.
        all_reduce, all_reduce_s: of the bytes that ranks of one model exchange, and of each exchange.
        launch_s: of a pass, for each layer.
        sequence_s: of a pass, for each sequence and layer.
        host_pass_s, host_sequence_s: between two passes: scheduling, booking.
        host_finished_s: for each request that has finished: detokenizing, writing it down.
        host_token_s: for each prompt token that is taken in: tokenizing.
    """

    matrices: float
    weights: float
    norm: float
    head: float
    attention: float
    kv: float
    pointwise: float
    all_reduce: float
    all_reduce_s: float
    launch_s: float
    sequence_s: float
    host_pass_s: float
    host_sequence_s: float
    host_finished_s: float
    host_token_s: float


NAMES = tuple(field.name for field in fields(Factors))
HOST = tuple(name for name in NAMES if name.startswith("host_"))
SHARED = ("matrices", "weights", "head", "attention", "kv", "pointwise")  # of what the ranks of a CPU share

# Assumed where nothing was fitted, for large models; not measured by this project but for the host's, which are those
# of fastgen's loop on the demo model. Products reach 0.7 of a GPU's dense peak, copies 0.85 of its bandwidth, attention
# 0.4 and 0.7; ten launches a layer of which 2 us each are not hidden; 10 us for an all-reduce.
GPU = Factors(
    matrices=1 / 0.7,
    weights=1 / 0.85,
    norm=3.0,
    head=1 / 0.7,
    attention=1 / 0.4,
    kv=1 / 0.7,
    pointwise=1 / 0.7,
    all_reduce=1 / 0.7,
    all_reduce_s=10e-6,
    launch_s=20e-6,
    sequence_s=0.05e-6,
    host_pass_s=0.5e-3,
    host_sequence_s=3e-6,
    host_finished_s=0.3e-3,
    host_token_s=2e-6,
)
CPU = replace(
    GPU,
    matrices=1 / 0.6,
    weights=1 / 0.7,
    norm=1.5,
    head=1 / 0.6,
    attention=1 / 0.15,
    kv=1 / 0.5,
    pointwise=3.0,
    all_reduce_s=100e-6,
    launch_s=50e-6,
    sequence_s=5e-6,
)


def defaults(accelerator: Accelerator) -> Factors:
    """Returns the factors that are assumed where nothing was fitted."""
    return CPU if accelerator is Accelerator.cpu else GPU


@dataclass(frozen=True, slots=True)
class Host:
    """A CPU's host, whose ranks share its cores and its memory.

    Attributes:
        cores: of all ranks.
        threads: most that a rank uses, whatever cores it has (``OMP_NUM_THREADS``); None for all of them.
    """

    cores: int
    threads: int | None = None

    def busy(self, ranks: int) -> float:
        """Returns how many cores each of so many ranks keeps busy; with fewer cores than ranks, its part of one."""
        own = self.cores // ranks if self.cores >= ranks else self.cores / ranks
        return min(own, self.threads or own)


def on_other_ranks(factors: Factors, seen: int, ranks: int, host: Host | None) -> Factors:
    """Returns the factors of ``seen`` ranks on a host as they are assumed to be with another number of them.

    What cores or memory bound takes the longer, the fewer cores a rank keeps busy, in proportion: the host's whole
    bandwidth is taken to need all its cores. What one thread does (launches, Python) stays. GPUs share nothing.

    Args:
        host: None for GPUs.
    """
    if host is None or seen == ranks:
        return factors
    scale = host.busy(seen) / host.busy(ranks)
    return replace(factors, **{name: getattr(factors, name) * scale for name in SHARED})


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a rank's share of a pass takes at the hardware's figures, in seconds.

    Attributes:
        matrix: a token's products in the layers; ``weights``: reading the layers' matrices once.
        row, head: a row of logits; reading the output projection once, of which each rank has the whole.
        pair: a token and a key that it sees; ``key``: reading a token's keys and values.
        point: what else is read and written for a token; ``exchange``: a token's all-reduces.
        layers, reduces: how many layers and all-reduces a pass has.
    """

    matrix: float
    weights: float
    row: float
    head: float
    pair: float
    key: float
    point: float
    exchange: float
    layers: int
    reduces: int

    @classmethod
    def of(cls, shape: ModelShape, hardware: HardwareConfig, dtype: str, tp: int) -> Roofline:
        """Returns the roofline of a rank of ``tp``.

        FLOPs are 2 for each element of a matrix and token, and 4 * heads * head_dim for each layer and pair of a token
        and a key (the product with the key, and that with the value). Two all-reduces a layer of ``hidden`` elements a
        token; a ring sends 2 * (tp - 1) / tp of them from each rank (Patarasuk and Yuan, 2009).

        Raises:
            UserError: a figure of the hardware is not known.
        """
        peak, bandwidth = _figure(hardware, f"peak_flops.{dtype}"), _figure(hardware, "memory_bandwidth")
        sent = 2 * shape.layers * shape.hidden * shape.element_bytes * 2 * (tp - 1) / tp
        heads = -(-shape.kv_heads // tp) / shape.kv_heads  # a rank has whole heads
        moved = shape.layers * (HIDDEN_MOVED * shape.hidden + INNER_MOVED * shape.inner / tp) * shape.element_bytes
        return cls(
            matrix=2 * shape.matmul / tp / peak,
            weights=shape.matrix_bytes / tp / bandwidth,
            row=2 * shape.head / peak,
            head=shape.head * shape.element_bytes / bandwidth,
            pair=4 * shape.layers * shape.heads * shape.head_dim / tp / peak,
            key=shape.kv_token_bytes * heads / bandwidth,
            point=moved / bandwidth,
            exchange=sent / _link(hardware, tp, bandwidth) if tp > 1 else 0.0,
            layers=shape.layers,
            reduces=2 * shape.layers if tp > 1 else 0,
        )

    def parts(self, factors: Factors, work: Any) -> dict[str, Any]:
        """Returns a pass's seconds by cause; of arrays of works, arrays.

        ``weights`` is what reading the weights adds to the products, ``head`` both for the output projection.
        """
        p = factors.norm
        products = factors.matrices * self.matrix * work.tokens
        reading = factors.weights * self.weights
        row, head = factors.head * self.row * work.logit_rows, factors.head * self.head * (work.logit_rows > 0)
        return {
            "matrices": products,
            "weights": (products**p + reading**p) ** (1 / p) - products,
            "head": (row**p + head**p) ** (1 / p),
            "attention": factors.attention * self.pair * work.attention_pairs,
            "kv": factors.kv * self.key * work.kv_read_tokens,
            "pointwise": factors.pointwise * self.point * work.tokens,
            "all_reduce": factors.all_reduce * self.exchange * work.tokens + factors.all_reduce_s * self.reduces,
            "launch": factors.launch_s * self.layers,
            "sequences": factors.sequence_s * self.layers * work.sequences,
        }


def _figure(hardware: HardwareConfig, name: str) -> float:
    group, _, dtype = name.partition(".")
    value = hardware.peak_flops.get(dtype) if dtype else getattr(hardware, group)
    if not value:
        remedy = f"give hardware.{name}=NUMBER, a hardware= with figures, or fit them: python -m harness.plan --fit RUN"
        raise UserError(f"hardware.{name}", f"not known of {hardware.name}", remedy)
    return float(value)


def _link(hardware: HardwareConfig, tp: int, bandwidth: float) -> float:
    """Returns the bytes/s that a rank sends: those of the slowest link of the ring."""
    if hardware.devices_per_node is not None and tp > hardware.devices_per_node:
        return _figure(hardware, "node_bandwidth")
    if hardware.accelerator is Accelerator.cpu and not hardware.interconnect_bandwidth:
        return bandwidth / CPU_LINK
    return _figure(hardware, "interconnect_bandwidth")
