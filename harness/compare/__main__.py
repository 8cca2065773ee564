"""Compares runs: ``python -m harness.compare [results/runs.csv] [--baseline RUN_ID] [--html FILE]``.

Repeated runs of one config become one line; a line shows only the settings that differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness.basics import page as pages
from harness.basics.command import Parser, output_ended, positive, show_any_text
from harness.basics.errors import INTERRUPTED, UserError, printable, report
from harness.basics.terminal import without_trailing_blanks
from harness.compare.reading import load

DEFAULT_TABLE = "results/runs.csv"
DEFAULT_LIMIT = 40


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m harness.compare",
        description="Compares runs: repeated ones on one line, only the settings that differ, ratios to a baseline.",
    )
    parser.add_argument(
        "tables",
        nargs="*",
        metavar="CSV",
        default=[DEFAULT_TABLE],
        help=f"tables of runs, or directories that hold a runs.csv; several are put together ({DEFAULT_TABLE})",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN_ID",
        help="what ratios are to: a run id or an unambiguous part of one "
        "(the oldest group with engine=baseline, without one the oldest)",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this setting, named as in the table or in runs.csv; the same KEY again is an alternative",
    )
    parser.add_argument(
        "--limit", type=positive, default=DEFAULT_LIMIT, metavar="N", help=f"lines in the terminal ({DEFAULT_LIMIT})"
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print all groups and figures as CSV")
    formats.add_argument("--json", action="store_true", help="print all groups, figures and settings as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a page with charts, which needs no network")
    parser.add_argument("--parquet", metavar="FILE", help="also write all runs, one a row, each column of its own type")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    show_any_text()
    try:
        _run(_parser().parse_args(arguments))
        sys.stdout.flush()
    except UserError as error:
        return report(error)
    except OSError as error:
        return output_ended(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    page = None if options.html is None else pages.writable(options.html)
    rows = None if options.parquet is None else pages.writable(options.parquet, "--parquet")
    runs = load(options.tables, lambda line: print(f"warning: {printable(line)}", file=sys.stderr))
    # Only now: pandas takes longer to import than a mistyped path takes to find.
    from harness.compare import comparison, text

    everything = options.csv or options.json or page is not None or rows is not None
    compared = comparison.compare(
        runs, baseline=options.baseline, where=options.where, limit=None if everything else options.limit
    )
    if page is not None:
        from harness.compare.page import html

        pages.write(page, html(compared, options.tables))
        print(f"wrote {printable(options.html)}", file=sys.stderr)
    if rows is not None:
        from harness.compare.parquet import as_bytes

        pages.write(rows, as_bytes(compared), "--parquet")
        print(f"wrote {printable(options.parquet)}", file=sys.stderr)
    if options.csv:
        sys.stdout.write(text.as_csv(compared))
    elif options.json:
        sys.stdout.write(text.as_json(compared))
    else:
        if page is not None or rows is not None:
            compared = comparison.limited(compared, options.limit)
        screen = text.terminal(sys.stdout.isatty())
        with screen.capture() as drawn:
            text.print_table(screen, compared)
        sys.stdout.write(without_trailing_blanks(drawn.get()))


if __name__ == "__main__":
    sys.exit(main())
