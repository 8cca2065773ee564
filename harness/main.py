"""The entry: under ``deepspeed`` this process is a rank; otherwise it becomes the only one, or starts several.

deepspeed --num_gpus 8 harness/main.py engine=fastgen ...
python harness/main.py engine=fastgen ...
python harness/main.py -m engine.token_budget=128,256         (a sweep, one launch a job)
Several hosts: launch/NODES.md.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script's own directory comes first on sys.path, where our modules would shadow installed packages.
sys.path[0] = str(ROOT)
# Ninja and the deepspeed command are installed beside the interpreter, which may be called by its path.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from harness.basics.errors import FULL_ERROR, INTERRUPTED, REFUSED, UserError, full_error, report  # noqa: E402
from harness.config import compose, flags  # noqa: E402
from harness.config.explain import explain  # noqa: E402
from harness.ranks.rank import Rank, current, decoded, without_local_rank  # noqa: E402


def main() -> int:
    """Composes the config and runs the job, or the jobs of a sweep; returns the exit status."""
    try:
        rank = current()
        sys.argv[1:] = decoded(without_local_rank(sys.argv[1:]))
    except UserError as error:
        return report(error)
    outcomes: list[int] = []
    begun: list[bool] = []

    def refuse(error: Exception) -> int:
        if rank is not None and not rank.first:
            return REFUSED
        if isinstance(error, UserError):
            return report(error)
        explained = explain(error)
        explained.__cause__ = error
        return report(explained)

    def job(composed: DictConfig) -> None:
        # Nothing is raised through Hydra, which would add lines of its own.
        begun.append(True)
        with full_error(asked):
            try:
                outcomes.append(_run(composed, rank))
            except (UserError, OmegaConfBaseException) as error:
                outcomes.append(refuse(error))

    asked = os.environ.get(FULL_ERROR)
    compose.register()
    try:
        sweeps = flags.parse(sys.argv[1:]).multirun
    except UserError as error:
        return refuse(error)
    try:
        if sweeps:
            if not _drives(rank, "-m"):
                return 0
            from harness.running.sweep import SWEEP

            rank, SWEEP.full_error = None, asked
        elif rank is not None:
            # Until the worker can write down an interruption, a rank leaves without a word (and no traceback).
            signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
        with full_error("1"):  # Hydra's own short form is several lines and exit status 1
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(job)()
        return _sweep_over() if sweeps and SWEEP.jobs else max(outcomes, default=0)  # hydra/launcher=basic has none
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _sweep_over(interrupted=True)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return refuse(error)
    except Exception as error:
        if begun or (sweeps and SWEEP.jobs):
            raise
        return refuse(error)  # Hydra lets some odd overrides through to a plain ValueError


def _run(composed: DictConfig, rank: Rank | None) -> int:
    from harness.ranks.rank import RUN_ID_VARIABLE

    hydra_config = HydraConfig.get()
    compose.check_choices(hydra_config.runtime.choices)
    overrides = list(hydra_config.overrides.task)
    if composed.resume is not None:
        from harness.running import resume

        composed = resume.compose(composed, overrides, rank)
    # A rank that our own launcher started has one of several runs to do already.
    if rank is None or RUN_ID_VARIABLE not in os.environ:
        if composed.sweep.confirm or composed.sweep.save_as is not None:
            raise UserError("experiment", "a search has several jobs", "add -m: python harness/main.py -m ...")
        if (composed.repeat > 1 or composed.sweep.resume) and _can_run(composed):
            from harness.running.sweep import SWEEP

            if not _drives(rank, f"repeat={composed.repeat}"):
                return 0
            signal.signal(signal.SIGINT, signal.default_int_handler)
            SWEEP.full_error = os.environ.get(FULL_ERROR)
            SWEEP.fixed, SWEEP.expected = {word.partition("=")[0] for word in overrides}, 1
            SWEEP.run(overrides, composed)
            return SWEEP.conclude()
    if rank is None:
        from harness.running import start

        return start.run(composed, overrides)
    from harness.running import worker

    return worker.run(composed, rank)


def _can_run(composed: DictConfig) -> bool:
    """Returns whether nothing is wrong with the job; if it is, one run says so as well as several."""
    from harness.running import job

    try:
        job.prepare(composed)
    except UserError:
        return False
    return True


def _drives(rank: Rank | None, what: str) -> bool:
    """Returns whether this process starts several runs: a plain one does, and of a launch the first rank.

    Raises:
        UserError: the launch spans several hosts, on which no rank can start another.
    """
    if rank is not None and rank.several_hosts:
        raise UserError(
            what,
            f"several runs need several launches, and this one spans {rank.world // rank.local_world} hosts",
            "use python harness/main.py -m ... on one host, or a shell loop over launch/multi_node.py",
        )
    return rank is None or rank.first


def _sweep_over(interrupted: bool = False) -> int:
    """Returns the exit status of a sweep, after its table."""
    from harness.running.sweep import SWEEP

    if not SWEEP.jobs:
        return INTERRUPTED
    composed = SWEEP.composed
    if not interrupted and composed is not None and (composed.sweep.confirm or composed.sweep.save_as):
        from harness.running import tune

        return tune.conclude(SWEEP, composed)
    return SWEEP.conclude(interrupted)


if __name__ == "__main__":
    sys.exit(main())
