"""What a run would need and could reach: ``python -m harness.plan [options] [overrides]``.

The overrides are those of ``harness/main.py``; nothing is loaded, and the machine that ``hardware=`` describes need not
be this one.

python -m harness.plan model=llama2_70b hardware=a100_80g parallel.tp=8
python -m harness.plan model=llama2_70b hardware=h100_80g --devices 64      (every split of them, the best first)
python -m harness.plan --fit RUN RUN                                        (the factors of the pass times, from runs)
python -m harness.plan --explain RUN                                        (what kept a run from the bound)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # A script's own directory comes first on sys.path, where our modules would shadow installed packages.
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [] if (root / "harness" / "conf").is_dir() else [str(root)]

from harness.basics.command import Parser, output_ended, positive, show_any_text
from harness.basics.errors import INTERRUPTED, UserError, report
from harness.basics.places import PROGRAM
from harness.config.compose import compose
from harness.engines import catalogue

BITS = (4, 8, 16)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m harness.plan",
        description="Memory, bounds and time of a run on a machine that hardware= describes, before it is booked.",
        epilog="Exit status: 0 it fits, 1 it does not, 2 for what is wrong in the question.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help=f"as for {PROGRAM}: model=llama2_70b parallel.tp=8"
    )
    parser.add_argument("--devices", type=positive, metavar="N", help="rank every split of N devices")
    parser.add_argument("--nodes", type=positive, metavar="M", help="hosts that the devices are on, equally many each")
    parser.add_argument("--json", action="store_true", help="print the same as JSON, in bytes, FLOPs and seconds")
    parser.add_argument("--weight-bits", type=int, choices=BITS, metavar="B", help="if weights had B bits: 4, 8 or 16")
    parser.add_argument("--kv-bits", type=int, choices=BITS, metavar="B", help="if the KV cache had B bits: 4, 8 or 16")
    parser.add_argument("--fit", nargs="+", metavar="RUN", help="fit the pass times of these runs; overrides go first")
    parser.add_argument("--name", metavar="NAME", help="with --fit: write conf/hardware/NAME.yaml (local)")
    parser.add_argument("--explain", metavar="RUN", help="from the bound to the rate of this run, cause by cause")
    parser.add_argument("--html", metavar="FILE", help="with --explain: also write a page with the chart")
    parser.add_argument("--results-dir", metavar="DIR", default="results", help="where RUN is looked up (results)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    show_any_text()
    try:
        options = _parser().parse_intermixed_args(arguments)
        _check(options)
        status = _run(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        return report(error)
    except OSError as error:
        return output_ended(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that mean nothing together."""
    if options.fit is not None and options.explain is not None:
        raise UserError("--explain", "cannot be asked together with --fit", "fit first, then explain")
    for name, needed in (("nodes", "devices"), ("name", "fit"), ("html", "explain")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise UserError(f"--{name}", f"means nothing without --{needed}", f"add --{needed}")
    for name in ("devices", "weight_bits", "kv_bits"):
        if getattr(options, name) is not None and (options.fit is not None or options.explain is not None):
            raise UserError(f"--{name.replace('_', '-')}", "is a question of a plan", "leave it out")


def _run(options: argparse.Namespace) -> int:
    catalogue.register()
    composed = compose(options.overrides)
    # Each part imports what it alone needs.
    if options.fit is not None:
        from harness.plan import fit

        return fit.run(options, composed)
    if options.explain is not None:
        from harness.plan import explain

        return explain.run(options, composed)
    from harness.plan import planning

    return planning.run(options, composed)


if __name__ == "__main__":
    sys.exit(main())
