"""The settings of ``hydra/launcher=slurm``: what each job of a sweep asks Slurm for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from harness.basics.errors import UserError, quoted
from harness.config.key import key


@dataclass
class SlurmSettings:
    """``hydra.launcher.*``; what is null is left to the cluster."""

    _target_: str = "hydra_plugins.slurm_launcher.SlurmLauncher"
    gpus_per_node: int | None = key(None, "GPUs of each node, `0` for a job on CPUs; it has to be given", unit="GPUs")
    nodes: int = key(1, "nodes of a job", unit="nodes")
    partition: str | None = key(None, "where the jobs run")
    account: str | None = key(None, "who pays for them")
    qos: str | None = key(None, "the quality of service")
    constraint: str | None = key(None, "what the nodes must have")
    time: int | str | None = key(None, "of a job: minutes, or as `sbatch` takes it", allowed="`90`, `'1-12:00:00'`")
    cpus_per_node: int | None = key(None, "cores of each node", unit="cores")
    mem: str | None = key(None, "memory of each node, `0` is all of it", allowed="as `sbatch` takes it: `64G`")
    exclusive: bool = key(False, "whether nothing else runs on the nodes")
    at_once: int | None = key(None, "jobs of the array that run at a time; all that find room", unit="jobs")
    requeue: bool = key(True, "a job that is preempted or nearly over is queued again and resumes its run")
    signal_s: int = key(120, "how long before the end of its time a job is told", unit="seconds")
    setup: list[str] = key([], "lines of shell before a job begins", allowed="such as `module load cuda`")
    sbatch: dict[str, Any] = key({}, "further options of `sbatch`", allowed="`{mail-type: END}`")
    poll_s: float = key(5.0, "between two looks at the queue", unit="seconds")


def check(settings: SlurmSettings) -> None:
    """Refuses what cannot work, before a job is submitted; raises UserError."""
    if settings.gpus_per_node is None:
        remedy = "give the GPUs of a node, or 0 for jobs on CPUs"
        raise UserError("hydra.launcher.gpus_per_node", "not set", remedy)
    least = {"gpus_per_node": 0, "nodes": 1, "cpus_per_node": 1, "at_once": 1, "signal_s": 1}
    for name, lowest in least.items():
        if (value := getattr(settings, name)) is not None and not lowest <= value <= 2**31:
            raise UserError(f"hydra.launcher.{name}", str(value), f"give a whole number from {lowest}")
    if not 0.1 <= settings.poll_s <= 3600:
        raise UserError("hydra.launcher.poll_s", str(settings.poll_s), "give seconds from 0.1 to 3600")
    for name in ("partition", "account", "qos", "constraint", "time", "mem"):
        text = str(getattr(settings, name) or "")
        if not text.isprintable() or " " in text:
            raise UserError(f"hydra.launcher.{name}", quoted(text), "give it as sbatch takes it, without spaces")
    if find_spec("submitit") is None:
        raise UserError("hydra/launcher", "slurm needs the package submitit", "pip install submitit")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        remedy = "start the sweep on a machine of the cluster, or leave out hydra/launcher=slurm"
        raise UserError("hydra/launcher", "slurm: there is no sbatch on this machine", remedy)


def sbatch_options(settings: SlurmSettings) -> dict[str, Any]:
    """Returns the settings as submitit's executor takes them."""
    srun = ["--kill-on-bad-exit=0", "--cpu-bind=none"]  # cores are not srun's to bind: one task starts a node's ranks
    if settings.cpus_per_node is not None:
        srun.append(f"--cpus-per-task={settings.cpus_per_node}")  # since Slurm 22.05 it does not take the job's
    # One that is not queued again had better use all of its time; submitit has it signalled in any case.
    told = f"USR1@{settings.signal_s}" if settings.requeue else "CONT@1"
    more: dict[str, Any] = {"signal": told, "requeue" if settings.requeue else "no-requeue": True, **settings.sbatch}
    more |= {name: value for name in ("time", "mem") if (value := getattr(settings, name)) is not None}
    device = "cuda" if settings.gpus_per_node else "cpu"
    return {
        "job_name": "harness",
        "nodes": settings.nodes,
        "ntasks_per_node": 1,
        "time": None,  # submitit's default would be five minutes
        "wckey": None,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_node,
        **{name: getattr(settings, name) for name in ("partition", "account", "qos", "constraint")},
        "exclusive": settings.exclusive or None,
        "array_parallelism": settings.at_once or 100_000,
        "additional_parameters": more,
        "srun_args": srun,
        "stderr_to_stdout": True,
        "setup": [f"export DS_ACCELERATOR={device}", *settings.setup],
    }
