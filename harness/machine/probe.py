"""What this machine's processor does, measured once and kept: the rate of matrix products, and of reading memory.

Figures are those of one rank: they hold for a processor, a number of cores and of threads, and a version of torch. Who
reads them needs no torch; who measures does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.basics.cache import cache_root
from harness.basics.clock import utc_now
from harness.basics.errors import UserError
from harness.basics.files import json_bytes, replace
from harness.machine import device, numa

if TYPE_CHECKING:
    import torch

COMMAND = "python launch/matrix_rate.py"  # with a type: measures anew and keeps what it finds
# Rows, columns and depth of products, in the order of their size: a layer's, of small models and of large ones.
SHAPES = (
    *((64, 512, 512), (64, 1024, 1024), (128, 1024, 1024), (256, 1024, 1024)),
    *((256, 2048, 2048), (512, 2048, 2048), (512, 4096, 4096)),
)
SHAPE_S = 0.06  # for each shape and way
MATRICES_S = 0.4  # no further shape is begun after that
LONGEST_S = 0.02  # of one product: many short ones find a moment in which nothing else runs
BANDWIDTH_S = 0.1
READ_BYTES = (2**27, 2**30)  # at least and at most; four times the last cache, so that it comes from memory
METHOD = 2  # of measuring; raised where figures taken before would not be taken today
BUSY = 0.5  # load average per core above which a figure is taken anew, once it is below half of that


@dataclass(frozen=True, slots=True)
class Figures:
    """What one rank's cores do.

    Attributes:
        dtype: torch type of the products.
        peak_flops: best rate of matrix products in it, FLOP/s.
        memory_bandwidth: best rate of reading memory, bytes/s.
        measured_at: when, UTC.
        load: the host's load average per core at that time.
        machine: what they hold for: ``cpu``, ``cores``, ``threads``, ``torch``.
    """

    dtype: str
    peak_flops: float
    memory_bandwidth: float
    measured_at: str
    load: float
    machine: dict[str, Any]


def measured(dtype: str, ranks: int = 1) -> Figures | None:
    """Returns what is known of this machine in a type, without measuring; None where it has not been measured.

    Args:
        ranks: that share this host; each has its part of the cores (:func:`harness.machine.numa.places`).
    """
    here, nodes = device.cores(), numa.nodes()
    cores = max(here // ranks, 1) if here >= ranks else here
    if len(nodes) > 1 and (bound := numa.places(ranks, numa.affinity(), nodes)):
        cores = len(bound[0].cores)
    return _read(dtype, _machine(cores, _threads(1 if here < ranks else cores)))


def figures(dtype: str, anew: bool = False, say: Callable[[str], Any] = lambda line: None) -> Figures:
    """Returns what is known of this process's cores and threads, measured now where nothing is; imports torch.

    Figures that were taken while the machine was busy are taken anew once it is idle; the better ones are kept.

    Args:
        anew: whether to measure in any case.
        say: told when something is measured.

    Raises:
        RuntimeError: torch does not multiply in this type here.
    """
    import torch

    machine = _machine(device.cores(), torch.get_num_threads())
    known, load = None if anew else _read(dtype, machine), _load()
    if known is not None and not (known.load > BUSY and load < BUSY / 2):
        return known
    cores, threads = machine["cores"], machine["threads"]
    say(f"measuring {dtype} products and memory (cores: {cores}, threads: {threads}; once, about a second)")
    flops, read = _rate_of_cores(dtype, min(threads, cores)), _reading_rate()
    if known is not None:
        flops, read = max(flops, known.peak_flops), max(read, known.memory_bandwidth)
    found = Figures(dtype, flops, read, utc_now(), load, machine)
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs a second, and no more
        _path(dtype, machine).parent.mkdir(parents=True, exist_ok=True)
        replace(_path(dtype, machine), json_bytes(asdict(found)))
    return found


def _rate_of_cores(dtype: str, threads: int) -> float:
    """Returns the sum of the best rates (FLOP/s) of so many threads, each with products of its own, all at once.

    Threads that share a product wait for each other: where another program has one of their cores, that would measure
    the wait.
    """
    import torch

    before, together = torch.get_num_threads(), threading.Barrier(threads)

    def one(_: int) -> float:
        torch.set_num_threads(1)
        together.wait()
        return matrix_rate(dtype, SHAPES, SHAPE_S, MATRICES_S)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, range(threads)))
    finally:
        torch.set_num_threads(before)


def matrix_rate(
    dtype: str, shapes: Iterable[tuple[int, int, int]], each_s: float, most_s: float | None = None
) -> float:
    """Returns this thread's best rate (FLOP/s) of products with weights, as given and as oneDNN lays them out for it.

    Where oneDNN has no kernels for bfloat16 it is a tenth of what float32 gives, in which bfloat16 can be multiplied as
    well: then the best rate is float32's.

    Args:
        shapes: (rows, columns, depth) of products of ``[rows, depth]`` with ``[columns, depth]``.
        each_s: seconds for each shape in each way.
        most_s: seconds after which no further shape is begun, and then no product as long as :data:`LONGEST_S`; None
            for all shapes.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    best, began = 0.0, time.perf_counter()
    with torch.inference_mode():
        for rows, columns, depth in shapes:
            flops = 2 * rows * columns * depth
            if most_s is not None and best:
                if time.perf_counter() - began > most_s:
                    break
                if flops / best > LONGEST_S:
                    continue
            few = torch.randn(64, depth)  # drawing all of them would take longer than multiplying
            weights = few.repeat(-(-columns // 64), 1)[:columns].to(kind)
            activations = few.repeat(-(-rows // 64), 1)[:rows].to(kind)
            for multiply in _ways(activations, weights):
                best = max(best, flops / _shortest(multiply, each_s))
    return best


def _ways(activations: torch.Tensor, weights: torch.Tensor) -> list[Callable[[], Any]]:
    import torch

    linear = torch.nn.functional.linear
    if weights.dtype is not torch.bfloat16:
        return [partial(linear, activations, weights)]
    if not device.has_bfloat16_kernels():
        return [partial(linear, activations.float(), weights.float())]
    packed = torch.ops.mkldnn._reorder_linear_weight(weights, len(activations))
    laid_out = partial(torch.ops.mkldnn._linear_pointwise, activations, packed, None, "none", [], "")
    return [partial(linear, activations, weights), laid_out]


def _reading_rate() -> float:
    """Returns the best rate (bytes/s) at which a matrix too large for the caches is read, times a vector."""
    import torch

    size = min(max(READ_BYTES[0], 4 * _last_cache_bytes()), READ_BYTES[1])
    with torch.inference_mode():
        matrix, vector = torch.ones(size // 4 // 4096, 4096), torch.ones(4096)
        return matrix.numel() * 4 / _shortest(partial(torch.mv, matrix, vector), BANDWIDTH_S)


def _shortest(call: Callable[[], Any], seconds: float) -> float:
    """Returns the shortest of the calls that are made in so many seconds, after one that is not counted."""
    call()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        call()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def _last_cache_bytes() -> int:
    """Returns the size of the last cache that the first core reads through; 0 where it is not told."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def _load() -> float:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def _threads(cores: int) -> int:
    """Returns the threads that torch will take where a rank has so many cores (``harness.running.setup``)."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else cores


def _machine(cores: int, threads: int) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"cpu": device.device_name("cpu"), "cores": cores, "threads": threads, "torch": version}


def _path(dtype: str, machine: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps([METHOD, machine, sorted(device.cpu_flags())]).encode()).hexdigest()[:16]
    return cache_root() / "hardware" / f"{name}-{dtype}.json"


def _read(dtype: str, machine: dict[str, Any]) -> Figures | None:
    try:
        found = Figures(**json.loads(_path(dtype, machine).read_bytes()))
        whole = found.peak_flops > 0 and found.memory_bandwidth > 0 and found.load >= 0
    except (OSError, ValueError, TypeError, UserError):
        return None
    return found if whole and (found.dtype, found.machine) == (dtype, machine) else None
