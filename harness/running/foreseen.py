"""How long a run will take, where ``hardware.fit`` was fitted on runs like it: for the record, and for who watches."""

from __future__ import annotations

from harness.basics.errors import UserError
from harness.config.schema import Stop
from harness.costs.fitted import Fitted
from harness.costs.lengths import uncounted_tokens
from harness.costs.pass_time import PassTime
from harness.costs.shape import ModelShape
from harness.engines import catalogue
from harness.engines.base import Engine
from harness.engines.simulate.replay import Item, Pass, Setup, replay
from harness.engines.simulate.tokens import drawn_length
from harness.running.job import Job
from harness.workload.records import Request, Workload

MOST = 500  # requests that are simulated; of more, every so many-th stands for those around it


def elapsed_s(job: Job, engine: Engine, workload: Workload) -> float | None:
    """Returns the seconds of the run's clock, simulated; None without a fit, or where the run lies outside of it.

    Prompts are as long as the dataset says, or guessed; outputs run to their ends, or to where the fit's runs ended.
    What prompts will share and which drafts will hold is not known before, and so neither is how long that takes.
    """
    hardware, limits, pool = job.config.hardware, engine.limits, engine.kv_pool
    engine_keys = job.config.engine
    unforeseen = getattr(engine_keys, "prefix_sharing", False) or getattr(engine_keys, "draft", None) is not None
    if not hardware.fit or not limits or pool is None or job.simulated or unforeseen:
        return None
    settings = engine.settings
    weight_bytes = catalogue.find(job.config.engine.name).share(job.config).weight_bytes
    budget, sequences = limits["token_budget"], limits["max_sequences"]
    try:
        shape = ModelShape.of(job.source.architecture, job.dtype, None if weight_bytes is None else 8 * weight_bytes)
        times = PassTime(shape, hardware, job.dtype, job.tp, settings.host_ranks, budget, sequences)
    except UserError:  # sizes or figures that are not known keep no run from being made
        return None
    if times.fitted is None or times.outside or times.fitted.kernels != engine.kernels:
        return None
    hazard = times.fitted.eos_hazard if job.config.generation.stop is Stop.eos else ()
    requests = engine.arrange(workload.requests)
    every = max(1, -(-len(requests) // MOST))
    items = [_item(request, hazard) for request in requests[::every]]
    setup = Setup(
        token_budget=budget,
        max_sequences=sequences,
        block_size=pool.block_size,
        blocks=pool.blocks,
        replicas=job.dp,
        lookahead=settings.lookahead,
    )
    ends = [event.started_s + event.seconds for event in replay(items, setup, times) if isinstance(event, Pass)]
    return max(ends, default=0.0) * len(requests) / max(1, len(items))


def fit_error(job: Job) -> float | None:
    """Returns how far the job's fit was off the times of real runs, relative, at most; None where it does not say."""
    fitted = Fitted.of(job.config.hardware.fit)
    return None if fitted is None else fitted.error


def _item(request: Request, hazard: tuple[tuple[int, float], ...]) -> Item:
    most = request.output_len or 1
    ends = drawn_length(0, request.index, hazard) or most if hazard else most
    return Item(request.index, uncounted_tokens(request), most, min(ends, most))
