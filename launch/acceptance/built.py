"""Whether DeepSpeed's ragged kernels are there: a stage that needs them is no place to compile them."""

from __future__ import annotations

import os
import sys

from acceptance.findings import Outcome
from acceptance.stage import Stage
from harness.engines.shared import deepspeed_ops


def missing(stage: Stage) -> str | None:
    """Returns why they are not, as the stage ``builds`` found; None where they are.

    Where that stage was cut short, this one ends too, to go on at the next start.
    """
    left = [name for name in deepspeed_ops.RAGGED if not deepspeed_ops.built(name)]
    if not left:
        return None
    for finding in stage.other("builds"):
        if finding.name in left and finding.outcome is not Outcome.passed:
            return f"stage builds: {finding.name}: {finding.detail}"
    print(f"the stage builds has yet to compile {', '.join(left)}", flush=True)
    sys.exit(os.EX_TEMPFAIL)
