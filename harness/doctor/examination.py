"""All that is looked at, in its order; what takes seconds begins first and is heard last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from omegaconf import DictConfig

from harness.basics.errors import UserError, show_traceback
from harness.config import checks
from harness.config.compose import compose, to_config
from harness.doctor import devices, given, heavy, hosts, kernels, machine, pairs, requirements
from harness.doctor.findings import CONFIG, Findings, OutputEnded
from harness.doctor.heavy import Heavy
from harness.doctor.kernels import Machine
from harness.doctor.pairs import Pairs
from harness.engines import catalogue
from harness.machine import device
from harness.ranks.rank import Rank

T = TypeVar("T")


def run(found: Findings, overrides: list[str], hostfile: str | None) -> None:
    """Looks at the machine, then at the config.

    Raises:
        UserError: the command line makes no sense on any machine.
    """
    catalogue.register()
    composed = _composed(overrides)
    slots = None if hostfile is None else hosts.read(hostfile)
    accelerator, count = device.accelerator(), device.cuda_devices()
    with ExitStack() as stack:
        packages = Heavy(heavy.wanted())
        stack.callback(packages.close)
        several = accelerator == "cuda" and count > 1
        network = Pairs("nccl", range(count)) if several else Pairs("gloo", range(2))
        stack.callback(network.close)
        _examine(found, composed, slots, packages, network)


def _composed(overrides: list[str]) -> DictConfig:
    composed = compose(overrides)
    if composed.resume is not None:
        from harness.running import resume

        composed = resume.compose(composed, overrides, None)
    checks.check(to_config(composed))
    return composed


def _examine(
    found: Findings, composed: DictConfig, slots: dict[str, int] | None, packages: Heavy, network: Pairs
) -> None:
    look = Look(found)
    look("cpu", lambda: machine.cpu(found))
    here = look("gpu", lambda: devices.found_here(found)) or Machine(device.accelerator())
    look("compiler", lambda: machine.compilers(found))
    look("kernels", lambda: kernels.all_of_them(found, here))
    look("models", lambda: kernels.models(found, here))
    look("packages", lambda: requirements.check(found))
    look("packages", lambda: heavy.packages(found, packages))
    look("extensions", lambda: heavy.extensions(found, packages))
    broken = look("gpu", lambda: devices.computing(found, packages))
    if broken and here.unusable is None:
        here = replace(here, unusable=broken[0])
    look("engines", lambda: kernels.engines(found, here, packages))
    unjoined = look("network", lambda: pairs.check(found, network))
    rank, unready = None, None
    if slots is not None:
        rank = Rank(world=sum(slots.values()), local_world=next(iter(slots.values())))
        unready = look("hosts", lambda: hosts.check(found, slots, here.accelerator))
    job = look(CONFIG, lambda: given.check(found, composed, here, packages, rank))
    if unready:
        found.no(CONFIG, f"not ready for a rank: {', '.join(unready)}", "see hosts")
    if job is not None and job.processes > 1 and unjoined:
        found.no(CONFIG, f"its ranks cannot join: {unjoined[0]}", "see network")
    if job is not None and job.runs_on == "cuda" and here.unusable is not None:
        found.no(CONFIG, f"it runs on cuda: {here.unusable}", "see gpu")


class Look:
    """Looks at one thing after the other; what goes wrong with one leaves the others."""

    def __init__(self, found: Findings) -> None:
        self._found = found

    def __call__(self, area: str, at: Callable[[], T]) -> T | None:
        """Returns what ``at`` does; None, and a line, where it raises."""
        try:
            return at()
        except OutputEnded:
            raise
        except UserError as error:  # what the user can mend, such as a variable of ours
            self._found.refused(area, error)
            return None
        except Exception as error:  # of a driver, a package or a file system that nobody here has seen
            show_traceback(error)
            self._found.no(
                area, f"could not be looked at: {type(error).__name__}: {error}", "HYDRA_FULL_ERROR=1 says more"
            )
            return None
