"""The entry: under ``deepspeed`` this process is a rank; otherwise it becomes the only one, or starts several.

deepspeed --num_gpus 8 harness/main.py engine=fastgen ...
python harness/main.py engine=fastgen ...
python harness/main.py -m engine.token_budget=128,256         (a sweep, one launch a job)
Several hosts: launch/NODES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # A script's own directory comes first on sys.path, where our modules would shadow installed packages.
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [] if (root / "harness" / "conf").is_dir() else [str(root)]

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.basics.command import collect_seldom, output_ended
from harness.basics.errors import FULL_ERROR, INTERRUPTED, REFUSED, UserError, complain, full_error, report
from harness.basics.outcome import leave
from harness.basics.places import CONF
from harness.basics.programs import beside_the_interpreter
from harness.config import compose, flags, help
from harness.config.explain import explain
from harness.engines import catalogue
from harness.machine.version import version
from harness.ranks.rank import Rank, current, decoded, without_local_rank
from harness.running import command

if TYPE_CHECKING:
    from harness.running.sweep import Sweep


def main() -> int:
    """Composes the config and runs the job, or the jobs of a sweep; returns the exit status."""
    rank: Rank | None = None
    beside_the_interpreter()
    try:
        rank = current()
        sys.argv[1:] = decoded(without_local_rank(sys.argv[1:]))
        catalogue.register()
        compose.compose_once()
        given = flags.parse(sys.argv[1:])
        compose.look_in_results_of(sys.argv[1:])
        if flags.only_prints(given):
            return _answer(given) if rank is None or rank.first else 0
        if given.multirun:
            return _sweep(rank)
        if rank is not None:
            # Until the worker can write down an interruption, a rank leaves silently (and without a traceback).
            signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
        return _with_hydra(rank, lambda composed: command.run(composed, rank))
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return _refuse(error, rank)


def _answer(given: argparse.Namespace) -> int:
    """Prints what a flag such as ``--help`` asks for; returns the exit status."""
    status, said = 0, io.StringIO()
    if given.version:
        said.write(f"{version()}\n")
    else:
        help.answer()
        # Printed below, so that a reader who has left is no error of Hydra's, which exits after some of these.
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            status = _with_hydra(None, lambda composed: 0)
    try:
        sys.stdout.write(said.getvalue())
        sys.stdout.flush()
    except OSError as error:
        return output_ended(error)
    return status


def _sweep(rank: Rank | None) -> int:
    if not command.drives(rank, "-m"):
        return 0
    from harness.running import engine_sweep
    from harness.running.sweep import Sweep

    sys.argv[1:] = engine_sweep.lenient(sys.argv[1:])
    sweep = Sweep(os.environ.get(FULL_ERROR))
    return command.concluded(sweep, lambda: _with_hydra(None, lambda composed: command.run(composed, None), sweep))


def _with_hydra(rank: Rank | None, run: Callable[[DictConfig], int], sweep: Sweep | None = None) -> int:
    """Has Hydra compose the command line and calls ``run`` with it; returns the exit status.

    Args:
        sweep: for the jobs of ``-m``, which Hydra's launcher hands up to it.
    """
    asked = os.environ.get(FULL_ERROR)
    begun: list[bool] = []
    statuses: list[int] = []

    def job(composed: DictConfig) -> None:
        # Nothing is raised through Hydra, which would add lines of its own.
        begun.append(True)
        with full_error(asked):
            try:
                statuses.append(run(composed))
            except (UserError, OmegaConfBaseException) as error:
                statuses.append(_refuse(error, rank))

    vars(job)["sweep"] = sweep  # the launcher is made by Hydra, and given this function
    try:
        with full_error("1"):  # Hydra's own short form is several lines and exit status 1
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (UserError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        if begun or (sweep is not None and sweep.jobs):
            raise
        return _refuse(error, rank)  # Hydra lets some odd overrides through to a plain ValueError
    return max(statuses, default=0)


def _refuse(error: Exception, rank: Rank | None) -> int:
    """Says in one line what is wrong with the command line, on rank 0 alone; returns the exit status."""
    if rank is not None and not rank.first:
        return REFUSED
    if isinstance(error, UserError):
        return report(error)
    explained = explain(error)
    explained.__cause__ = error
    return report(explained)


def entry() -> NoReturn:
    """The command ``llama-harness``."""
    collect_seldom()
    leave(main())


if __name__ == "__main__":
    entry()
