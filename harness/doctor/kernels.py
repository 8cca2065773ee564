"""Which kernels each model option would get on this machine, and which engines run here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.basics.cache import cache_root
from harness.basics.errors import UserError
from harness.basics.places import CONF
from harness.config.compose import compose, to_config
from harness.config.schema import DType, ModelConfig
from harness.doctor.findings import Findings
from harness.doctor.heavy import Heavy
from harness.engines import catalogue
from harness.engines.base import EngineSettings
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.known_model import KnownModel
from harness.engines.room import Here
from harness.machine import device
from harness.machine.gpus import Gpu
from harness.models import demo
from harness.ranks.rank import Rank
from harness.ranks.tensor_parallel import TensorParallel
from harness.running import job as jobs
from harness.running import preflight, setup, target
from harness.running.job import Job


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides the choice of kernels.

    Attributes:
        accelerator: ``cpu`` or ``cuda``.
        gpus: those that this process sees.
        unusable: why nothing runs on this accelerator, in a clause; None where it can.
    """

    accelerator: str
    gpus: tuple[Gpu, ...] = ()
    unusable: str | None = None

    @property
    def capability(self) -> tuple[int, int] | None:
        """The first GPU's, which decides on every rank."""
        return self.gpus[0].capability if self.accelerator == "cuda" and self.gpus else None


def all_of_them(found: Findings, machine: Machine) -> None:
    """Says which kernels can be had here, whatever the model."""
    if machine.unusable is not None:
        found.no("kernels", f"none on {machine.accelerator}: {machine.unusable}")
        return
    for name, lack in lacks(machine).items():
        if lack is None:
            found.ok("kernels", f"{name}: can be had here")
        else:
            found.no("kernels", f"{name}: not here: {lack}")


def lacks(machine: Machine) -> dict[str, str | None]:
    """Returns, by kernels, why they cannot be had here, whatever the model; None where they can."""
    known = [kernels for kernels in Kernels if kernels is not Kernels.auto]
    return {
        kernels.value: choice.missing(kernels, FastGenConfig(), machine.accelerator, machine.capability)
        for kernels in known
    }


def models(found: Findings, machine: Machine) -> None:
    """Says what each option of ``conf/model`` would get at its usual type, and whether it has room; loads nothing."""
    if machine.unusable is not None:
        return
    said, composed = set(lacks(machine).values()), compose(["engine=fastgen"])
    for path in sorted((CONF / "model").glob("*.yaml")):
        try:
            # As Hydra would, which takes a third of a second each time.
            composed.model = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path))
            job, short = _fitting(composed)
        except UserError as error:
            found.no("models", f"{path.stem}: {error}")
            continue
        known = KnownModel.of(job.source, job.dtype, job.tp, job.max_context)
        taken, reasons = choice.foretell(FastGenConfig(), known, machine.accelerator, machine.capability)
        own = {kernels.value: why for kernels, why in reasons.items() if why not in said}
        text = f"{path.stem} in {job.dtype}{f' on tp={job.tp}' * (job.tp > 1)}: {taken.value} kernels{_not(own)}"
        if machine.accelerator == "cpu":
            on_gpu = replace(known, dtype=jobs.resolve_dtype(DType.auto, "cuda"))
            text += f"; on a GPU {_suiting(on_gpu)}"
        if short is None:
            found.ok("models", text)
        else:
            why = short.found if short.field == "model" else f"{short.field}: {short.found}"
            found.no("models", f"{text}; it has no room here: {why}", short.remedy)


def _fitting(composed: DictConfig) -> tuple[Job, UserError | None]:
    """Returns the job of a model that need not be here, and why this machine has no room for it."""
    try:
        job = planned(composed)
    except UserError as error:
        if error.field != "parallel":
            raise
        return planned(jobs.with_split(composed, 1, 1)), error
    return job, next(iter(memory_refusals(job)), None)


def planned(composed: DictConfig, rank: Rank | None = None) -> Job:
    """Returns the job as this machine would run it, its model as ``conf/`` describes it where no path is given."""
    config = to_config(composed)
    if catalogue.find(config.engine.name).simulates:  # on a machine that need not be there either
        return jobs.prepare(composed, rank)
    machine = target.this_machine(config, device.accelerator(), rank)
    return jobs.prepare(composed, rank, planned=replace(machine, here=False))


def memory_refusals(job: Job, rank: Rank | None = None) -> list[UserError]:
    """Returns all that preflight says against the job's memory on this machine."""
    if not job.config.preflight or job.simulated:
        return []
    machine = target.this_machine(job.config, job.accelerator, rank)
    ranks = job.ranks if rank is None else rank.local_world
    checks: list[Any] = [lambda: preflight.check_copies(job, ranks)]
    if job.accelerator == "cpu":
        checks.append(lambda: preflight.check_host(job, ranks))
    else:
        checks.append(lambda: preflight.check_devices(job, machine, lambda tp, dp: jobs.refusal(job, tp, dp)))
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


def _suiting(known: KnownModel) -> str:
    """Returns the kernels for CUDA that compute a model by its config, the fastest first, and why not the others."""
    reasons = {
        kernels.value: None if kernels is Kernels.torch else choice.unsupported(kernels, known)
        for kernels in choice.ORDER["cuda"]
    }
    suiting = [name for name, why in reasons.items() if why is None]
    return " or ".join(suiting) + _not({name: why for name, why in reasons.items() if why is not None})


def _not(reasons: dict[str, str]) -> str:
    return "".join(f", not {name}: {why}" for name, why in reasons.items())


def engines(found: Findings, machine: Machine, heavy: Heavy) -> None:
    """Says of each engine whether it runs here with the default model, by its files where they are at hand."""
    place = cache_root() / demo.NAME
    composed = compose([])
    composed.model.path = str(place) if demo.complete(place) else None
    for name in catalogue.names():
        try:
            composed.engine = OmegaConf.structured(catalogue.find(name).config())  # the defaults of conf/engine too
            job = planned(composed)
            here = what_it_takes(job, machine)
            if job.runs_on == "cuda" and machine.unusable is not None:
                raise UserError("engine", machine.unusable)
            lacking = [package for package in catalogue.find(name).packages if heavy.package(package)["error"]]
            if lacking:
                raise UserError("engine", f"{', '.join(lacking)} cannot be imported", "see packages")
        except UserError as error:
            found.no(
                "engines", f"{name}: {'' if error.field == 'engine' else f'{error.field}: '}{error.found}", error.remedy
            )
        else:
            found.ok("engines", f"{name} runs here, {here.kernels} kernels{_not(dict(here.passed_over))}")


def what_it_takes(job: Job, machine: Machine) -> Here:
    """Returns what the job's engine would compute with on this machine; raises UserError for what it lacks."""
    settings: EngineSettings[Any] = setup.engine_settings(job, Rank(world=job.ranks, local_world=job.ranks), None)
    if job.tp > 1 and not job.simulated:
        settings = replace(settings, tensor=TensorParallel(0, job.tp, 0, None, None))
    return catalogue.find(job.config.engine.name).here(settings, machine.capability)


def _named(engine: str, error: UserError) -> str:
    return f"{engine}: {error.found}" if error.field == "engine" else f"{engine}: {error.field}: {error.found}"
