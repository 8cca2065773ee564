"""``python -m harness.plan --explain RUN``: what kept a real run from the limit, cause by cause."""

from __future__ import annotations

import argparse
from pathlib import Path

from omegaconf import DictConfig

from harness.basics.files import json_bytes
from harness.basics.files import replace as replace_file
from harness.config.compose import to_config
from harness.plan.explanation import explained, text
from harness.plan.measured import Measured


def run(options: argparse.Namespace, composed: DictConfig) -> int:
    """Prints the waterfall of a run, and writes the page if one is asked for; returns the exit status.

    Raises:
        UserError: the run is none, or it says too little.
    """
    found = explained(Measured.of("--explain", options.explain, options.results_dir), to_config(composed).hardware)
    if options.html is not None:
        from harness.plan import chart  # the charts' code is a second's work

        path = Path(options.html)
        replace_file(path, chart.page(found).encode())
    if options.json:
        print(json_bytes(found.plain).decode())
    else:
        print("\n".join(text(found)))
    return 0
