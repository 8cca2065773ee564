"""What this machine can run, and what the given config would take: ``python -m harness.doctor [options] [overrides]``.

The overrides are those of ``harness/main.py``; no model is loaded and nothing is fetched.

python -m harness.doctor                                        (the default config)
python -m harness.doctor model=llama2_70b parallel.tp=8
python -m harness.doctor --hostfile hosts parallel.tp=8         (the hosts of a launch too)
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # A script's own directory comes first on sys.path, where our modules would shadow installed packages.
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [] if (root / "harness" / "conf").is_dir() else [str(root)]

from harness.basics.command import Parser, output_ended, show_any_text
from harness.basics.errors import INTERRUPTED, UserError, report
from harness.basics.places import PROGRAM
from harness.basics.programs import beside_the_interpreter
from harness.doctor import requirements
from harness.doctor.findings import CONFIG, Findings, OutputEnded, show


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m harness.doctor",
        description="What this machine can run and what the given config would take, by a run's own checks.",
        epilog="Exit status: 0 the config can run here, 1 it cannot, 2 for what is wrong in the question.",
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=f"as for {PROGRAM}: model.path=DIR")
    parser.add_argument("--json", action="store_true", help="print the findings as a list of objects")
    parser.add_argument("--hostfile", metavar="FILE", help="the hosts of a launch, as for deepspeed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    show_any_text()
    try:
        options = _parser().parse_intermixed_args(arguments)
        beside_the_interpreter()
        found = Findings(aloud=not options.json)
        if requirements.composable():
            from harness.doctor import examination  # needs packages that may not be there

            examination.run(found, options.overrides, options.hostfile)
        else:
            requirements.check(found)
            found.no(CONFIG, "packages are missing without which no config can be read", requirements.SET_UP)
        status = found.conclude()
        if options.json:
            show(json.dumps([one.plain() for one in found.all], indent=2))
        return status
    except UserError as error:
        return report(error)
    except OutputEnded as ended:
        assert isinstance(ended.__cause__, OSError)
        return output_ended(ended.__cause__)
    except KeyboardInterrupt:
        return INTERRUPTED


def entry() -> NoReturn:
    """The command ``llama-harness-doctor``."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # what runs beside is ended first
    sys.exit(main())


if __name__ == "__main__":
    entry()
