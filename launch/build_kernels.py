"""Compiles DeepSpeed's CUDA kernels ahead of the first run: python launch/build_kernels.py [--injected]

What engine.kernels=deepspeed and engine=mii need: about 15 CPU-minutes, for all GPUs of this host, kept for later runs.
--injected adds those of engine=ds_inference engine.kernel_inject=true. Locks that killed builds have left are cleared.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.basics.errors import UserError, report
from harness.engines.shared import deepspeed_ops, ragged_kernels
from harness.machine import device

LOOK_S = 5.0


def main() -> int:
    """Builds what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injected", action="store_true", help="those of kernel injection too")
    options = parser.parse_args()
    names = [*deepspeed_ops.RAGGED, *(deepspeed_ops.INJECTED if options.injected else ())]
    try:
        check()
        for name in names:
            build(name)
    except UserError as error:
        return report(error)
    return 0


def check() -> None:
    """Raises UserError where nothing can be built."""
    if device.accelerator() != "cuda":
        found = "there is no GPU here, or torch is a build without CUDA"
        raise UserError("CUDA", found, "run it on the machine that has the GPUs")
    if (reason := ragged_kernels.not_installed()) is not None:
        remedy = "install nvcc and g++, and .venv/bin/pip install -e '.[kernels]' for the package"
        raise UserError("DeepSpeed's kernels", reason, remedy)


def build(name: str) -> None:
    """Builds one extension, and says how far it is; raises UserError."""
    started, over = time.monotonic(), threading.Event()

    def follow() -> None:
        last = None
        while not over.wait(LOOK_S):
            if (now := deepspeed_ops.compiled(name)) != last:
                print(f"{name}: {now[0]} of {now[1]} files, {time.monotonic() - started:.0f} s", flush=True)
                last = now

    watcher = threading.Thread(target=follow, daemon=True)
    if not deepspeed_ops.built(name):
        watcher.start()
    try:
        deepspeed_ops.load([name])
    except deepspeed_ops.OpsError as error:
        raise UserError("DeepSpeed's kernels", str(error), "engine.kernels=torch does without") from error
    finally:
        over.set()
    architectures = os.environ.get(deepspeed_ops.ARCHITECTURES, "the GPUs here")
    print(f"{name}: ready for {architectures} ({deepspeed_ops.folder(name)}), {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
