"""``python -m harness.plan --explain RUN``: what kept a real run from the limit, cause by cause."""

from __future__ import annotations

import argparse
import sys

from omegaconf import DictConfig

from harness.basics import page
from harness.basics.files import json_bytes
from harness.config.compose import to_config
from harness.plan.explanation import explained, text
from harness.plan.measured import Measured

LONG = 1000  # requests whose simulations take long enough to tell of each


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Prints the waterfall of a run, and writes the page if one is asked for; returns the exit status.

    Raises:
        UserError: the run is none, or it says too little.
    """
    path = None if options.html is None else page.writable(options.html)
    measured = Measured.of("--explain", options.explain, options.results_dir)
    long = len(measured.completions) >= LONG
    found = explained(measured, to_config(composed).hardware, _say if long else lambda line: None)
    if path is not None:
        from harness.plan import chart  # the charts' code is a second's work

        page.write(path, chart.page(found))
    if options.json:
        print(json_bytes(found.plain).decode())
    else:
        print("\n".join(text(found)))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
