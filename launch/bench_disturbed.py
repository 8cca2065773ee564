"""What a busy process on one core costs a run, by how long OpenMP's threads spin before they sleep.

    python launch/bench_disturbed.py [--rounds 5] [--cores 0,1] [--waits ours,default,passive,1000] [overrides ...]

Runs the job (python harness/main.py, by default a model of two tiny layers) in turn with each way to wait, quiet and
beside a process that takes the last of the cores whole. ``ours`` is what the harness sets by itself, ``default`` GNU's
own choice, ``passive`` sleeps at once, and a number is GOMP_SPINCOUNT. Beside the median rate stands the sum, over the
passes of a run, of each one's fastest time in any round: what the run takes where nothing disturbs it, even if this
machine was never quiet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.results.passes import pass_rows
from harness.results.table import read_rows

GNU_DEFAULT = 300_000  # turns, where OMP_WAIT_POLICY is not set (libgomp, env.c)
# Real code and next to no arithmetic, so that waiting is all that can be slow.
TINY = [
    *("model=llama2_7b", "model.weights=dummy", "model.dtype=float32", "generation.stop=length"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=64"),
    *("model.architecture.intermediate_size=96", "model.architecture.num_attention_heads=4"),
    *("model.architecture.num_key_value_heads=4", "dataset=synthetic", "dataset.prompt=random"),
    *("dataset.num_samples=100", "dataset.input_len=30", "dataset.output_len=20"),
]
# Ends with whoever started it.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100000))\n"


@dataclass(slots=True)
class Found:
    """What the runs of one way to wait had, quiet or disturbed."""

    rates: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    fastest: list[float] = field(default_factory=list)  # of each pass, seconds


def variables(wait: str) -> dict[str, str]:
    """Returns what a way to wait adds to the environment."""
    if wait == "ours":
        return {}
    if wait == "passive":
        return {"OMP_WAIT_POLICY": "passive"}
    return {"GOMP_SPINCOUNT": str(GNU_DEFAULT) if wait == "default" else wait}


@contextmanager
def beside(core: int | None) -> Iterator[None]:
    """Has a process of its own take ``core`` whole meanwhile; None for none."""
    if core is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    os.sched_setaffinity(process.pid, {core})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(wait: str, overrides: list[str], cores: set[int], found: Found) -> dict[str, str]:
    """Runs the job once, notes what came of it in ``found``, and returns its row; ends the program if it failed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "harness/main.py", *overrides, f"results_dir={directory}"]
        line = ["taskset", "-c", ",".join(map(str, sorted(cores))), *command]
        done = subprocess.run(line, cwd=ROOT, env=kept | variables(wait), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}")
        (row,) = read_rows(Path(directory) / "runs.csv")
        seconds = [one for (one,) in pass_rows(Path(directory) / row["run_id"] / "passes.csv", "seconds")]
    found.rates.append(float(row["total_tokens_per_s"]))
    if row.get("others_cpu_share"):
        found.others.append(float(row["others_cpu_share"]))
    found.fastest = [min(pair) for pair in zip(found.fastest or seconds, seconds, strict=True)]
    return row


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", default="0,1", help="those of the run; the last one is disturbed")
    parser.add_argument("--waits", default="ours,default,passive,1000", help="ways to wait; the first is compared with")
    options, overrides = parser.parse_known_args()
    waits, cores = options.waits.split(","), {int(core) for core in options.cores.split(",")}
    found = {(wait, quiet): Found() for quiet in (True, False) for wait in waits}
    row: dict[str, str] = {}
    for number in range(options.rounds):
        for wait, quiet in found if number % 2 == 0 else reversed(found):
            with beside(None if quiet else max(cores)):
                row = run(wait, overrides or TINY, cores, found[wait, quiet])
            rate, load = found[wait, quiet].rates[-1], os.getloadavg()[0]
            kind = "quiet" if quiet else "disturbed"
            print(f"round {number + 1}  {wait:8}  {kind:9}  {rate:9,.1f} total tokens/s, load {load:.1f}", flush=True)
    print(
        f"\n{row['model']} {row['dtype']}, {row['kernels']} kernels, {row['total_tokens']} tokens, cores "
        f"{options.cores}, {row['device_name']}, median of {options.rounds}"
    )
    print("waiting    machine     total tok/s   ratio   fastest passes   taken by others")
    for (wait, quiet), one in found.items():
        rate = statistics.median(one.rates)
        share = f"{statistics.median(one.others):.1%}" if one.others else "?"
        print(
            f"{wait:8}   {'quiet' if quiet else 'disturbed':9}   {rate:11,.1f}   "
            f"{rate / statistics.median(found[waits[0], quiet].rates):5.2f}   {sum(one.fastest):12.3f} s   {share:>15}"
        )


if __name__ == "__main__":
    main()
