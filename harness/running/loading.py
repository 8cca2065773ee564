"""From a checked job to an engine that is ready; all of it outside the clock."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

from harness.costs.fitted import rank_peak
from harness.engines import catalogue
from harness.engines.base import Engine, EngineSettings
from harness.machine import snapshot
from harness.models.loaded import identity
from harness.ranks.rank import RUN_ID_VARIABLE
from harness.running import foreseen, peaks, setup
from harness.running.context import RunContext
from harness.running.job import Job, resolve_requests
from harness.running.sampling import of_rank
from harness.workload.records import Workload


@dataclass(slots=True)
class Loaded:
    """What is ready to run. Nothing else keeps the engine, so that deleting it here frees its memory.

    Attributes:
        foreseen_s: what the clock is predicted to show at the end, where runs like it were fitted.
    """

    engine: Engine
    workload: Workload
    foreseen_s: float | None = None


def load(run: RunContext) -> Loaded:
    """Loads and warms the engine, and resolves the requests with its tokenizer.

    Raises:
        UserError: the model cannot be loaded or the requests cannot be run with it.
    """
    settings = _settings(run)
    _begin_record(run)
    if settings.described is None:
        run.peak_flops = peaks.find(run)
    else:
        run.peak_flops = rank_peak(settings.described.hardware, run.job.dtype, settings.described.host_ranks)
    loaded = _load(run, settings)
    _warm_up(run, loaded)
    return loaded


def _settings(run: RunContext) -> EngineSettings:
    """Returns the engine's settings, once this rank has its cores and has joined the others."""
    job = run.job
    if not job.simulated:  # else nothing is computed, and what this machine does meanwhile is not the run's
        run.crowded = setup.use_cores(job, run.rank)
        directory = run.recorder.directory if run.recorder is not None else None
        run.telemetry = of_rank(run.rank, job.accelerator, catalogue.find(job.config.engine.name).spreads, directory)
    run.replicas = setup.join(job, run.rank, run.rendezvous)
    settings = setup.engine_settings(job, run.rank, run.replicas)
    run.device = None if job.simulated else settings.device
    return settings


def _begin_record(run: RunContext) -> None:
    job, model = run.job, run.job.config.model
    if model.dtype.value == "auto" and job.dtype == "float32":
        run.notes.append("this machine does not compute bfloat16: model.dtype=auto took float32")
    chosen = any(word.startswith("model=") for word in sys.argv)  # else nobody has said what it should be
    if chosen and job.work["model"] != model.name:
        run.notes.append(f"model={model.name} describes another model: using the checkpoint's own config")
    if run.recorder is not None:
        run.recorder.check_work(**job.work)
        if RUN_ID_VARIABLE not in os.environ:  # else the launching parent has done it
            run.recorder.settle(job.settings, split=job.split.record)
    environment = snapshot.snapshot(job.runs_on)
    if job.simulated:
        name = f"{job.config.hardware.name} (simulated)"
        environment |= {"device": job.accelerator, "device_name": name}
        run.note(simulated="fit" if job.config.hardware.fit else "data sheet")
    run.note(
        **job.work,
        job_hash=job.job_hash,
        prediction=job.prediction,
        requests=len(job.workload.requests),
        device=environment["device"],
        device_name=environment["device_name"],
        environment=environment,
        phase="load",
    )


def _load(run: RunContext, settings: EngineSettings) -> Loaded:
    job = run.job
    engine = catalogue.create(settings)
    run.say(f"loading {job.work['model']} ({job.dtype}) for {job.config.engine.name} on {_where(job, settings.device)}")
    started = time.perf_counter()
    try:
        engine = _loaded(run, engine)
    finally:
        run.facts["phase"] = engine.phase
    load_s = time.perf_counter() - started - (engine.proof or {}).get("seconds", 0.0)
    run.facts["phase"] = "run"
    run.note(load_s=load_s, proof=engine.proof, phase="run", **engine.facts)
    return Loaded(engine, resolve_requests(job, engine.tokenizer))


def _where(job: Job, device: str) -> str:
    """Returns what the model runs on, for the user."""
    return f"{job.ranks} simulated {job.config.hardware.name}" if job.simulated else device


def _loaded(run: RunContext, engine: Engine) -> Engine:
    """Returns the engine once it is loaded, or the one that took its place since its passes were not the model's."""
    if run.job.simulated:
        engine.load()
        return engine
    from harness.engines.proof import proof  # imports torch

    return proof.load(engine, run.say)


def _warm_up(run: RunContext, loaded: Loaded) -> None:
    engine, workload = loaded.engine, loaded.workload
    started = time.perf_counter()
    engine.warm_up()
    warmup_s = time.perf_counter() - started
    run.notes += engine.notes
    run.note(
        requests=len(workload.requests),
        kernels=engine.kernels,
        **engine.limits,
        warmup_s=warmup_s,
        left_out=workload.left_out or None,
    )
    if run.recorder is not None:
        if (foreseen_s := foreseen.elapsed_s(run.job, engine, workload)) is not None:
            loaded.foreseen_s = foreseen_s
            run.note(prediction={**run.recorder.record.get("prediction", {}), "elapsed_s": foreseen_s})
        run.note(loaded=identity(run.recorder.record, run.job.source))
    run.say(f"running {len(workload.requests)} requests of {workload.name}")
