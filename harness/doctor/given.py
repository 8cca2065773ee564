"""The given config: whether it can run here, by all that a run refuses beforehand, and what it would take."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from harness.basics.cache import cache_root
from harness.basics.errors import UserError
from harness.basics.files import can_write, cannot_write
from harness.config.compose import to_config
from harness.config.devices import options
from harness.config.schema import Accelerator, Config, ModelConfig, Weights
from harness.costs import lengths
from harness.costs import memory as costs
from harness.costs.memory import gib
from harness.doctor import kernels
from harness.doctor.findings import CONFIG, Findings
from harness.doctor.heavy import Heavy
from harness.doctor.kernels import Machine
from harness.engines import catalogue
from harness.machine import device
from harness.models import demo, locate
from harness.ranks.rank import Rank, check_world
from harness.results.directory import read_record
from harness.results.opening import refuse_to_resume
from harness.results.table import read_table
from harness.running import job as jobs
from harness.running import launcher, preflight, target
from harness.running.job import Job
from harness.workload import reading

NEEDED = ("torch", "transformers")
LAUNCHED = ("deepspeed",)  # what starts several ranks
# Bytes of completions.jsonl and passes.csv, twice what the runs in results/reference wrote.
TOKEN_BYTES, REQUEST_BYTES = 32, 400


def check(found: Findings, composed: DictConfig, machine: Machine, heavy: Heavy, rank: Rank | None) -> Job | None:
    """Says what is for and against a run of the config; returns the job as far as it can be told.

    Args:
        rank: the first of the launch that a hostfile describes; None where the run starts its own ranks.
    """
    config = to_config(composed)
    whole = _dataset(found, config) and _checkpoint(found, config)
    job, taken = _job(found, composed, rank, whole)
    _results(found, config, job)
    if job is None:
        _would_take(found, None, composed)
        return None
    _requests(found, job)
    placed, room = _ranks(found, job, rank), _memory(found, job, rank)
    _engine(found, job, machine, heavy)
    if not placed or not room or any(one.text.startswith("parallel") for one in found.against):
        _would_take(found, job, taken)
    return job


def _dataset(found: Findings, config: Config) -> bool:
    try:
        workload = reading.read(config.dataset)
    except UserError as error:
        found.refused(CONFIG, error)
        return False
    found.ok(CONFIG, f"dataset {workload.name}: {len(workload.requests):,} requests")
    return True


def _checkpoint(found: Findings, config: Config) -> bool:
    """Says where the model is; returns whether a run would find it without fetching anything."""
    model = config.model
    if catalogue.find(config.engine.name).simulates:
        return True
    if unmade_demo(model):
        _demo_to_come(found)
        return False
    try:
        source = locate.locate(model)
    except UserError as error:
        found.refused(CONFIG, error)
        return False
    if source.kind == "hub":
        found.note(CONFIG, f"model {source.path} is a hub's: what is not in the local cache is fetched as it is loaded")
    elif source.kind == "dummy":
        found.ok(CONFIG, f"model {model.name}: made-up weights, nothing is read")
    else:
        found.ok(CONFIG, f"model {locate.model_name(model, source)}: {source.path}, whole by its headers")
    return True


def unmade_demo(model: ModelConfig) -> bool:
    """Whether the config's model is the demo model, and a run would have to fetch it first."""
    wanted = model.demo and model.path is None and model.weights is Weights.pretrained
    return wanted and not demo.complete(cache_root() / demo.NAME)


def _demo_to_come(found: Findings) -> None:
    root, remedy = cache_root(), "python -m harness.models.demo makes it, or give model.path=DIR"
    try:
        free = shutil.disk_usage(can_write(root)).free
    except OSError as error:
        found.no(CONFIG, f"HARNESS_CACHE: the demo model cannot be kept in {root} ({error.strerror})", remedy)
        return
    if free < demo.SPACE:
        short = f"{free / 1e6:.0f} MB are free in {root}, the demo model takes {demo.SPACE / 1e6:.0f} MB to make"
        found.no(CONFIG, f"HARNESS_CACHE: {short}", "free space, or set HARNESS_CACHE to another directory")
        return
    found.note(CONFIG, f"the demo model is not in {root}: the first run fetches it, 89 MB, and needs a network", remedy)


def _job(found: Findings, composed: DictConfig, rank: Rank | None, whole: bool) -> tuple[Job | None, DictConfig]:
    """Returns the job as a run would make it, and its config; if that is refused, as if the model were here.

    Then the model is what ``conf/`` says of it, and as a last resort the split is not asked for what fits.
    """
    try:
        if whole:
            return jobs.prepare(composed, rank), composed
    except UserError as error:
        found.refused(CONFIG, error)
    described = composed.copy()
    described.model.path = None
    alone = jobs.with_split(described, composed.parallel.tp or 1, composed.parallel.dp or 1)
    for attempt in (composed, described, alone):
        try:
            return kernels.planned(attempt, rank), attempt
        except UserError as error:
            found.refused(CONFIG, error)
    return None, composed


def _requests(found: Findings, job: Job) -> None:
    """Says which requests would be rejected, by the dataset's own lengths or a guess; prompts are not tokenized."""
    known = lengths.of(job.workload.requests, job.max_context, job.config.generation.max_output_len)
    if not known.rejected:
        return
    text = f"{known.rejected:,} of {len(job.workload.requests):,} requests are longer than the model's context"
    text += f" of {job.max_context:,} tokens, and are rejected" if job.max_context else ""
    remedy = "set generation.max_output_len, or take shorter ones"
    if known.items or job.workload.requests[0].prompt:
        found.note(CONFIG, f"{text} (before they are tokenized)", remedy)
    else:
        found.no(CONFIG, text, remedy)


def _ranks(found: Findings, job: Job, rank: Rank | None) -> bool:
    """Says whether there are as many ranks, and devices for them, as the config asks for; returns it."""
    try:
        if rank is not None:
            check_world(rank, job.tp, job.dp)
        else:
            launcher.check_devices(job.tp, job.dp, job.runs_on)
    except UserError as error:
        found.refused(CONFIG, error)
        return False
    where = "simulated on one core" if job.simulated else f"on {job.runs_on}"
    found.ok(CONFIG, f"tp={job.tp} x dp={job.dp} {where}, {job.dtype}: {job.split.why}")
    return True


def _memory(found: Findings, job: Job, rank: Rank | None) -> bool:
    """Says whether the job has room; returns it."""
    refusals = kernels.memory_refusals(job, rank)
    for refusal in refusals:
        found.refused(CONFIG, refusal)
    if refusals or job.simulated:
        return not refusals
    if not job.config.preflight:
        found.note(CONFIG, "preflight=false: whether it has room is left to the run")
        return True
    machine = target.this_machine(job.config, job.accelerator, rank)
    ranks = job.ranks if rank is None else rank.local_world
    peak = preflight.prediction(job, machine, ranks).get("peak_memory_bytes")
    size = machine.memory.size
    if size is None:
        return True  # there is no device, which is said elsewhere
    if peak is None:
        found.note(CONFIG, "what it takes of memory is not known before the model is loaded")
        return True
    has = f"its device has {gib(size)}" if job.accelerator == "cuda" else f"{gib(size)} of memory are free for {ranks}"
    found.ok(CONFIG, f"it has room: about {gib(peak)} at most a rank, {has}")
    return True


def _engine(found: Findings, job: Job, machine: Machine, heavy: Heavy) -> None:
    """Whether the engine has on this machine what it needs for this model."""
    name = job.config.engine.name
    room = catalogue.find(name)
    needed = () if room.simulates else (*NEEDED, *room.packages, *(LAUNCHED if job.processes > 1 else ()))
    for package in dict.fromkeys(needed):
        if (error := heavy.package(package)["error"]) is not None:
            found.no(CONFIG, f"engine={name} needs the package {package}: {error}", "see packages")
    try:
        here = kernels.what_it_takes(job, machine)
    except UserError as error:
        found.refused(CONFIG, error)
        return
    others = "".join(f", not {other}: {why}" for other, why in here.passed_over.items())
    found.ok(CONFIG, f"engine={name} computes it with {here.kernels} kernels{others}")


def _results(found: Findings, config: Config, job: Job | None) -> None:
    """Whether a run could write what it leaves behind."""
    root = Path(config.results_dir)
    try:
        place = can_write(root)
        read_table(root / "runs.csv")
        if config.resume is not None:
            refuse_to_resume(config.resume, read_record(root, config.resume) or {})
        free = shutil.disk_usage(place).free
    except UserError as error:
        found.refused(CONFIG, error)
        return
    except (OSError, ValueError) as error:
        found.refused(CONFIG, cannot_write(config.results_dir, error))
        return
    there = "" if place == root else ", which is made"
    if job is None:
        found.ok(CONFIG, f"results go to {root}{there}; {gib(free)} are free")
        return
    outputs = lengths.of(job.workload.requests, job.max_context, job.config.generation.max_output_len).output_tokens
    wanted = outputs * TOKEN_BYTES + len(job.workload.requests) * REQUEST_BYTES
    text = f"results go to {root}{there}; they take up to {wanted / 1e6:,.1f} MB of the {gib(free)} that are free"
    if wanted > free:
        found.no(CONFIG, text, "free space, or set results_dir to another disk")
    else:
        found.ok(CONFIG, text)


def _would_take(found: Findings, job: Job | None, composed: DictConfig) -> None:
    """Says which devices would have room for the config, and how many of them, where this machine has not.

    Args:
        job: as it is here; None where it is refused whatever the memory.
    """
    asked = (composed.parallel.tp, composed.parallel.dp)
    devices = [one for one in options() if one.accelerator is Accelerator.cuda and one.memory_bytes is not None]
    try:
        if job is None or job.accelerator != "cuda":
            job = jobs.prepare(jobs.with_split(composed, 1, 1), planned=target.described(devices[0]))
        needs = preflight.memory_needs(job)
    except UserError:  # it is for a CPU, or wrong wherever it runs
        return
    if needs is None:
        return
    fitting = []
    for hardware in devices:
        machine = target.described(hardware)
        try:
            split = jobs.choose(replace(job, split=replace(job.split, asked=asked)), machine)
        except UserError:
            continue
        if costs.shortage(split.tp, machine.launch.host_ranks, machine.memory, needs) is None:
            fitting.append(f"{split.tp * split.dp} x {hardware.name}")
    weights = f"{gib(needs.sharded + needs.whole)} of {job.dtype} weights"
    text = f"what it would take: devices with room for {weights} and a KV cache: "
    text += f"{', '.join(fitting) or 'more than any device of conf/hardware has, so split'}; "
    remedy = "python -m harness.plan hardware=NAME and the same overrides says what each would reach"
    found.note(CONFIG, f"{text}here are {device.cuda_devices()} CUDA devices", remedy)
