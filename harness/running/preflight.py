"""What a job takes of memory, before anything is loaded: the sums, what they refuse, and the peak that they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.basics.errors import UserError
from harness.costs import lengths
from harness.costs import memory as costs
from harness.costs.memory import Held, Memory, Needs, gib
from harness.costs.shape import ELEMENT_BYTES, ModelShape
from harness.engines import catalogue
from harness.engines.room import Share
from harness.engines.shared.kv_memory import too_much
from harness.machine.memory import available_memory_bytes
from harness.models.architecture import parameters, required_bytes
from harness.models.directory import copied_from
from harness.running.target import RANK_BYTES, Target

if TYPE_CHECKING:
    from harness.running.job import Job

LOADED_BYTES = 430 * 2**20  # resident memory of a rank on a CPU whose model has no size (measured: 430 MiB)
HELD = 0.8  # of what the longest sequences hold at their ends
FORCE = "preflight=false tries it all the same"


def share(job: Job) -> Share:
    """Returns what the job's engine makes of the memory."""
    return catalogue.find(job.config.engine.name).share(job.config)


def model_shape(job: Job, weight_bits: float | None = None, kv_bits: float | None = None) -> ModelShape:
    """Returns the job's model with the bits of its engine, or those given; raises UserError where sizes are unknown."""
    own = share(job).weight_bytes
    bits = weight_bits if weight_bits is not None else None if own is None else own * 8
    return ModelShape.of(job.source.architecture, job.dtype, bits, kv_bits)


def memory_needs(job: Job, weight_bits: float | None = None, kv_bits: float | None = None) -> Needs | None:
    """Returns what a replica takes; None where the model's sizes are not known."""
    if parameters(job.source.architecture) is None:
        return None
    shape, engine = model_shape(job, weight_bits, kv_bits), share(job)
    useful = costs.useful_tokens(job.workload.requests, job.max_context, engine.tokens)
    return Needs(
        sharded=int(shape.matrix_bytes + shape.head_bytes),
        whole=int(shape.other_bytes - shape.head_bytes),
        token=int(shape.kv_token_bytes),
        kv_heads=shape.kv_heads,
        tokens=useful,
        part=engine.part,
        given=engine.given,
        most=max(useful, min(engine.tokens, engine.rows * (job.max_context or engine.tokens))),
    )


def activations(job: Job, shape: ModelShape, tp: int) -> int:
    """Returns the bytes of activations of the engine's largest pass."""
    engine = share(job)
    longest = max((length.prompt for length in _lengths(job).items), default=1)
    rows = min(engine.rows, len(job.workload.requests))
    return costs.activation_bytes(shape, engine.pass_tokens or longest, max(1, rows), tp)


def held_tokens(job: Job) -> int:
    """Returns about how many tokens the KV cache of a replica holds at most.

    The longest of as many requests as run at a time would all have to be at their ends at once: by then others are
    younger. Measured with ``engine.order=longest_first``, 64 to 200 sequences: 82 to 91% of their sum.
    """
    return int(HELD * _most_held(job, job.dp * share(job).rows) / job.dp)


def _most_held(job: Job, sequences: int) -> int:
    """Returns the tokens that so many of the longest requests hold at their ends."""
    return sum(_lengths(job).held[-sequences:])


def _lengths(job: Job) -> lengths.Lengths:
    return lengths.of(job.workload.requests, job.max_context, job.config.generation.max_output_len)


def _packed(job: Job) -> bool:
    """Whether the checkpoint's weights take fewer bytes than their type says, or one rank spreads them over devices."""
    quantized = job.source.kind != "dummy" and bool(job.source.architecture.get("quantization_config"))
    return quantized or (catalogue.find(job.config.engine.name).spreads and job.accelerator == "cuda")


def check_host(job: Job, local_ranks: int) -> None:
    """Refuses what this host's free memory certainly does not hold; raises UserError.

    Weights that are mapped from their file may leave memory, so that the sum with the KV cache proves nothing.

    Args:
        local_ranks: of this host, on its CPU.
    """
    free, tp = available_memory_bytes(), job.tp
    if local_ranks > 1 and local_ranks * RANK_BYTES > free:
        raise UserError(
            "parallel",
            f"{local_ranks} ranks need {local_ranks * RANK_BYTES / 2**30:.1f} GiB before they load a model, "
            f"{free / 2**30:.1f} GiB of memory are free",
            f"ask for at most {max(free // RANK_BYTES, 1)} ranks (tp={tp} x dp)",
        )
    _check_weights(job, -(-local_ranks // tp), free)
    given = share(job).given
    if given is not None and given * local_ranks > free:
        setting = getattr(job.config.engine, "kv_memory", given)
        where = f" for each of {local_ranks} ranks" if local_ranks > 1 else ""
        raise too_much(setting, given, free // local_ranks, where)


def check_copies(job: Job, local_ranks: int) -> None:
    """Refuses ranks that share a model where each would copy all of it into the host's memory first; raises UserError.

    Weights that are stored in the run's own type are mapped from their files, and take memory only as it is there.
    """
    room = catalogue.find(job.config.engine.name)
    needed = required_bytes(job.source.architecture, ELEMENT_BYTES[job.dtype]) if job.source.architecture else None
    if job.tp == 1 or needed is None or not room.loads_whole(job.config, job.accelerator):
        return
    free = available_memory_bytes()
    if needed * local_ranks <= free or not (stored := copied_from(job.source, job.dtype)):
        return
    remedy = "use more hosts, or fewer ranks"
    if stored in ELEMENT_BYTES:
        remedy = f"use model.dtype={stored}, in which they are stored and need not be copied"
    if job.accelerator == "cuda":
        remedy += ", or engine=fastgen with engine.kernels=auto, whose ranks read their own part"
    raise UserError(
        "parallel.tp",
        f"{job.tp}: each of {local_ranks} ranks here loads all {gib(needed)} of weights into the host's memory before "
        f"it keeps its part, {gib(needed * local_ranks)} together, and {gib(free)} are free",
        f"{remedy}; {FORCE}",
    )


def _check_weights(job: Job, replicas: int, free: int) -> None:
    dtype = job.dtype
    needed = required_bytes(job.source.architecture, ELEMENT_BYTES[dtype]) if job.source.architecture else None
    if needed is None or needed * replicas <= free:
        return
    if needed <= free:
        raise UserError(
            "parallel.dp",
            f"{replicas} replicas need {needed * replicas / 2**30:.1f} GiB for their weights, "
            f"{free / 2**30:.1f} GiB of memory are free",
            f"use parallel.dp of at most {free // needed}",
        )
    raise UserError(
        "model",
        f"{dtype} weights need {needed * replicas / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free",
        f"use a smaller model{' or model.dtype=bfloat16' if dtype == 'float32' else ''}, or a larger machine; {FORCE}",
    )


def check_devices(job: Job, machine: Target, refusal: Callable[[int, int], UserError | None]) -> None:
    """Refuses what the devices certainly do not hold: weights and the KV cache of one token, or of the bytes given.

    Args:
        refusal: why (tp, dp) cannot be run, whatever the memory; None when they can.

    Raises:
        UserError: with the nearest setting that has room.
    """
    needs = None if _packed(job) else memory_needs(job)
    size = machine.memory.size
    if needs is None or size is None or not (missing := _missing(needs, size, job.tp)):
        return
    fitting = (tp for tp in range(job.tp + 1, machine.launch.host_ranks + 1) if not _missing(needs, size, tp))
    larger = next((tp for tp in fitting if refusal(tp, 1) is None), None)
    remedies = []
    if needs.given is not None and (left := size - needs.weights(job.tp)) > 0:
        remedies.append(f"give engine.kv_memory at most {left / 2**30:.1f}GiB, or a fraction such as 0.5")
    if larger is not None:
        remedies.append(f"use parallel.tp={larger}, or more devices")
    remedies = remedies or ["use larger devices or a smaller model"]
    raise UserError("parallel.tp", f"{job.tp}: {missing}", f"{', or '.join(remedies)}; {FORCE}")


def _missing(needs: Needs, size: int, tp: int) -> str | None:
    """Returns what a device of ``size`` bytes certainly lacks."""
    cache = needs.given if needs.given is not None else needs.held(1, tp)
    if needs.weights(tp) + cache <= size:
        return None
    cached = f" and {gib(cache)} of KV cache" if needs.given is not None else ""
    return f"a rank needs {gib(needs.weights(tp))} of weights{cached}, its device has {gib(size)}"


def held(job: Job, needs: Needs, shape: ModelShape, memory: Memory, tp: int, ranks: int) -> Held:
    """Returns what the memory of one of ``ranks`` of a host goes to; ``memory.size`` is known."""
    return costs.held(needs, memory, tp, ranks, activations(job, shape, tp))


def prediction(job: Job, machine: Target, local_ranks: int) -> dict[str, Any]:
    """Returns what the record says of the job before it runs: the peak of a rank's memory, where it can be told.

    On a GPU that is what PyTorch allocates: weights, the whole KV cache, activations. On a CPU it is resident memory:
    the process's own as well, and of the KV cache only what is written, since memory that was never needed is never
    touched: at most what as many of the longest requests hold as run at once.
    """
    needs = None if _packed(job) else memory_needs(job)
    if needs is None or machine.memory.size is None:
        return {}
    found = held(job, needs, model_shape(job), machine.memory, job.tp, local_ranks)
    if job.accelerator != "cpu":
        return {"peak_memory_bytes": found.weights + found.cache + found.activations}
    cache = min(found.cache, _most_held(job, share(job).rows) * found.token)
    return {"peak_memory_bytes": LOADED_BYTES + found.weights + cache + found.activations}
