"""The command: ``bash launch/gpu_acceptance.sh``, which makes the environment and then starts this.

Exit status: 0 all stages passed, 1 one did not, 2 bad arguments, 3 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from acceptance import archive, driver, here, kernels, no_device, stages, table
from acceptance.records import Status
from acceptance.stages import Plan
from harness.basics.errors import UserError, report

NO_CUDA = 3  # exit status
STARTED = "ACCEPTANCE_STARTED"  # when gpu_acceptance.sh was, seconds since the epoch
FOLDERS = {False: "results/acceptance", True: "results/acceptance-rehearsal"}


def main() -> int:
    """Runs the acceptance; returns the exit status."""
    asked, plans = arguments()
    if not asked.rehearse and (reason := here.no_cuda()) is not None:
        no_device.tell(reason)
        return NO_CUDA
    try:
        machine = here.look(asked.rehearse)
        driver.claim(asked, machine)
        lock = os.open(asked.out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("--out", f"{asked.out}: an acceptance is running there", "wait for it") from None
        folder = asked.out / kernels.FOLDER
        if not asked.rehearse:
            if told := kernels.restore(folder):
                driver.say(told)
            kernels.mark(folder)
        records = driver.Driver(asked, plans, machine).run()
        print("", table.write(asked.out, machine, asked.rehearse, records), sep="\n", flush=True)
        pack(asked, folder)
    except UserError as error:
        return report(error)
    chosen = asked.chosen(plans)
    return 0 if all(record.status is Status.passed for record in records if record.stage in chosen) else 1


def pack(asked: driver.Asked, folder: Path) -> None:
    """Makes what is to be carried away, and says what that is."""
    size, left = archive.pack(asked.out, asked.out / "acceptance.tar.gz")
    without = f", without {', '.join(left)}" if left else ""
    print(f"{asked.out / 'acceptance.tar.gz'}: {size / 2**20:.1f} MiB{without}", flush=True)
    started = time.monotonic()
    if not asked.rehearse and (kept := kernels.pack(folder, asked.out / "kernels.tar.gz")):
        took = f"packed in {time.monotonic() - started:.0f} s; {kernels.VARIABLE} takes it"
        print(f"{asked.out / 'kernels.tar.gz'}: {kept / 2**20:.1f} MiB, {took}", flush=True)


def arguments() -> tuple[driver.Asked, Sequence[Plan]]:
    """Reads the command line; returns what it asks for, and the stages."""
    parser = argparse.ArgumentParser(prog="bash launch/gpu_acceptance.sh", description=__doc__.splitlines()[0])
    names = ", ".join(plan.name for plan in stages.STAGES)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the CPU, stand-ins and tiny sizes")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help=f"of {names}")
    parser.add_argument("--again", default="", metavar="NAME,NAME", help="or all: repeat what is done")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="for everything")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default {FOLDERS[False]}, or {FOLDERS[True]}")
    parser.add_argument("--stages", default=stages.__name__, help=argparse.SUPPRESS)  # tests bring their own
    given = parser.parse_args()
    plans: Sequence[Plan] = importlib.import_module(given.stages).STAGES
    known = [plan.name for plan in plans]
    chosen = {option: [name for name in getattr(given, option).split(",") if name] for option in ("only", "again")}
    if chosen["again"] == ["all"]:
        chosen["again"] = known
    for option, those in chosen.items():
        if unknown := [name for name in those if name not in known]:
            parser.error(f"--{option}: {unknown[0]!r}; give some of {', '.join(known)}, with commas between")
    if not given.budget > 0:
        parser.error(f"--budget: {given.budget:g}; give seconds, more than 0")
    out = (given.out or here.ROOT / FOLDERS[given.rehearse]).absolute()
    budget = given.budget - max(0.0, time.time() - float(os.environ.get(STARTED) or time.time()))
    return driver.Asked(out, given.rehearse, chosen["only"], chosen["again"], budget), plans


if __name__ == "__main__":
    sys.exit(main())
