"""Stage builds: DeepSpeed's kernels compiled ahead of what needs them; in a rehearsal, our C++ kernels for the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import psutil  # type: ignore[import-untyped]

from acceptance.findings import Outcome
from acceptance.stage import Stage
from harness.basics.errors import UserError
from harness.machine import device

A_JOB = 4 * 2**30  # bytes of memory that one nvcc takes, at most


def run(stage: Stage) -> None:
    """Builds what is missing, with all cores."""
    if stage.rehearse:
        native(stage)
    else:
        from harness.engines.shared import deepspeed_ops

        extensions(stage, deepspeed_ops.RAGGED)


def extensions(stage: Stage, names: Sequence[str]) -> None:
    """Builds and loads DeepSpeed's extensions, and reports each by its name; refused where they cannot be built."""
    import build_kernels

    from harness.engines.shared import deepspeed_ops
    from harness.machine import build_locks

    jobs = max(1, min(device.cores(), psutil.virtual_memory().available // A_JOB))
    os.environ.setdefault("MAX_JOBS", str(jobs))
    try:
        build_kernels.check()
    except UserError as error:
        for name in names:
            if not stage.done(name):
                stage.report(name, Outcome.refused, str(error))
        return
    for name in names:
        if stage.done(name):
            continue
        with stage.check(name) as check:
            if build_locks.clear(deepspeed_ops.folder(name)):
                print(f"{name}: a lock that a build had left behind is gone")
            check.figures |= {"there_already": int(deepspeed_ops.built(name)), "jobs": int(os.environ["MAX_JOBS"])}
            build_kernels.build(name)
            check.detail = str(deepspeed_ops.folder(name))


def native(stage: Stage) -> None:
    """Builds the native kernels, or finds them."""
    from harness.engines.fastgen.runners.native import build

    if not stage.done("native"):
        with stage.check("native") as check:
            started = time.time()
            made = build.library()
            check.figures["there_already"] = int(made.stat().st_mtime < started)
            check.detail = made.name
