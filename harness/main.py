"""The entry: under ``deepspeed`` this process is a rank; otherwise it starts the ranks.

deepspeed --num_gpus 8 harness/main.py engine=fastgen ...
python harness/main.py engine=fastgen ...
Several hosts: launch/NODES.md.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

from harness import config, ranks  # noqa: E402
from harness.errors import FULL_ERROR, INTERRUPTED, REFUSED, UserError, report  # noqa: E402
from harness.explain import explain  # noqa: E402

GROUPS = ("engine", "model", "dataset", "generation", "parallel", "hardware")


def main() -> int:
    """Composes the config and runs the job; returns the exit status."""
    try:
        rank = ranks.current()
        sys.argv[1:] = ranks.decoded(ranks.without_local_rank(sys.argv[1:]))
    except UserError as error:
        return report(error)
    if rank is not None:
        # Until the worker can write down an interruption, a rank leaves without a word (and no traceback).
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
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
        with _full_error(asked):
            try:
                outcomes.append(_run(composed, rank))
            except (UserError, OmegaConfBaseException) as error:
                outcomes.append(refuse(error))
        if outcomes[-1] == INTERRUPTED:
            sys.exit(INTERRUPTED)  # the rest of a sweep as well

    asked = os.environ.get(FULL_ERROR)
    config.register()
    try:
        if rank is not None and {"-m", "--multirun"} & set(sys.argv):
            raise UserError("--multirun", "a sweep is not run by one launch", "use python harness/main.py -m ...")
        with _full_error("1"):  # Hydra's own short form is several lines and exit status 1
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")(job)()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return refuse(error)
    except Exception as error:
        if begun:
            raise
        return refuse(error)  # Hydra lets some odd overrides through to a plain ValueError
    return max(outcomes, default=0)


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    """Sets whether Hydra shows tracebacks, for as long as the block lasts; None takes the variable away."""
    before = os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value
    try:
        yield
    finally:
        os.environ.pop(FULL_ERROR, None)
        if before is not None:
            os.environ[FULL_ERROR] = before


def _run(composed: DictConfig, rank: ranks.Rank | None) -> int:
    hydra_config = HydraConfig.get()
    for group in GROUPS:
        if group not in hydra_config.runtime.choices:  # Hydra would merge a list of options into one
            raise UserError(group, "no option, or several", f"choose one, or sweep over them with -m {group}=a,b")
    overrides = list(hydra_config.overrides.task)
    if rank is None:
        from harness import launcher

        return launcher.run(composed, overrides)
    from harness import worker

    return worker.run(composed, rank)


if __name__ == "__main__":
    sys.exit(main())
