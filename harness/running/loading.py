"""From a checked job to an engine that is ready; all of it outside the clock."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from harness.basics.clock import duration
from harness.costs.fitted import rank_peak
from harness.engines import catalogue
from harness.engines.base import Engine, EngineSettings
from harness.machine import device, snapshot
from harness.models import chat
from harness.models.loaded import identity
from harness.ranks.rank import RUN_ID_VARIABLE
from harness.running import foreseen, peaks, setup, target
from harness.running.context import RunContext
from harness.running.job import Job, resolve_chats, resolve_requests
from harness.running.sampling import of_rank
from harness.workload import catalogue as workloads
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
    job, place = run.job, None
    if not job.simulated:  # else nothing is computed, and what this machine does meanwhile is not the run's
        run.crowded, place = setup.use_cores(job, run.rank)
        directory = run.recorder.directory if run.recorder is not None else None
        run.telemetry = of_rank(run.rank, job.accelerator, catalogue.find(job.config.engine.name).spreads, directory)
    run.replicas = setup.join(job, run.rank, run.rendezvous)
    settings = setup.engine_settings(job, run.rank, run.replicas, place)
    run.device = None if job.simulated else settings.device
    return settings


def _begin_record(run: RunContext) -> None:
    job, model = run.job, run.job.config.model
    if model.dtype.value == "auto" and job.dtype == "float32":
        run.notes.append("this machine does not compute bfloat16: model.dtype=auto took float32")
    if not model.demo and job.work["model"] != model.name:  # else nobody has said what it should be
        run.notes.append(f"model={model.name} describes another model: using the checkpoint's own config")
    _note_template(run)
    if run.recorder is not None:
        run.recorder.check_work(**job.work)
        if RUN_ID_VARIABLE not in os.environ:  # else the launching parent has done it
            run.recorder.settle(job.settings, **job.choices)
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
        devices=_devices(run),
        device=environment["device"],
        device_name=environment["device_name"],
        environment=environment,
        phase="load",
    )


def _devices(run: RunContext) -> int:
    """Returns how many devices the run has to itself, which is what ``hardware.price_per_hour`` is of."""
    job = run.job
    if job.accelerator == "cuda":
        spreads = catalogue.find(job.config.engine.name).spreads
        return device.cuda_devices() if spreads and not job.simulated else job.ranks
    hardware = job.config.hardware
    here = target.described(hardware, job.ranks).launch.host_ranks if job.simulated else run.rank.local_world
    return -(-job.ranks // here)  # a CPU's price is a host's


def _note_template(run: RunContext) -> None:
    """Says in the record whether prompts become chats, and to a user whose own prompts do not though they could."""
    job = run.job
    dataset = workloads.find(job.workload.name)
    if not dataset.takes("chat_template"):
        return
    applied, known = job.config.dataset.chat_template, chat.has_template(job.config.model, job.source)
    run.note(chat_template={"applied": applied, "known": known})
    if known and not applied and dataset.takes("path"):
        run.notes.append("the model has a chat template, and prompts are fed as they are: see dataset.chat_template")


def _load(run: RunContext, settings: EngineSettings) -> Loaded:
    job = run.job
    chats = resolve_chats(job)
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
    return Loaded(engine, chats or resolve_requests(job, engine.tokenizer))


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
    run.notes += [*engine.notes, *workload.notes]
    run.note(
        requests=len(workload.requests),
        kernels=engine.kernels,
        **engine.limits,
        warmup_s=warmup_s,
        left_out=workload.left_out or None,
    )
    takes = ""
    if run.recorder is not None:
        if (foreseen_s := foreseen.elapsed_s(run.job, engine, workload)) is not None:
            loaded.foreseen_s = foreseen_s
            error = foreseen.fit_error(run.job)
            found = {"elapsed_s": foreseen_s, "elapsed_error": error}
            run.note(prediction={**run.recorder.record.get("prediction", {}), **found})
            takes = f", {duration(foreseen_s)} by a fit"
            takes += "" if error is None else f" that was at most {error:.1%} off"
        run.note(loaded=identity(run.recorder.record, run.job.source))
    run.say(f"running {len(workload.requests)} requests of {workload.name}{takes}")
