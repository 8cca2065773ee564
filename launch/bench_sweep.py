"""What a run costs beyond its job: seconds a job that are not load, warm-up or the run's clock.

    python launch/bench_sweep.py [--jobs 3] [--rounds 5] [--against CHECKOUT] [overrides ...]

Runs a sweep of that many jobs that differ in dataset.seed alone, and the same job by itself (python harness/main.py),
in turn; --jobs 0 leaves the sweep out. With another checkout of the harness, its runs alternate with ours, each in the
same environment. Beyond a job lie the imports, the row, and the end of the processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.results.table import read_rows


def beyond(root: Path, words: list[str], results: Path) -> float:
    """Runs ``harness/main.py`` of the checkout ``root``; returns the seconds beyond its jobs, for each of them."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "harness/main.py", *words, f"results_dir={results}"],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    rows = read_rows(results / "runs.csv")
    inside = sum(float(row[name]) for row in rows for name in ("load_s", "warmup_s", "elapsed_s"))
    return (seconds - inside) / len(rows)


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of the harness")
    options, overrides = parser.parse_known_args()
    overrides = overrides or ["dataset.num_samples=4"]
    checkouts = {"": ROOT} if options.against is None else {"this, ": ROOT, "other, ": options.against.resolve()}
    single, sweep = "by itself", "in a sweep"
    kinds = {single: overrides}
    if options.jobs:
        kinds[sweep] = ["-m", *overrides, f"dataset.seed={','.join(map(str, range(options.jobs)))}"]
    found: dict[str, list[float]] = {name + kind: [] for kind in kinds for name in checkouts}
    with tempfile.TemporaryDirectory() as directory:
        for root in checkouts.values():  # what is made once (kernels, proofs, compiled modules) is no run's cost
            beyond(root, overrides, Path(directory) / f"first-{len(os.listdir(directory))}")
    for number in range(options.rounds):
        for kind, words in kinds.items():
            for name, root in checkouts.items():
                with tempfile.TemporaryDirectory() as directory:
                    found[name + kind].append(beyond(root, words, Path(directory)))
        print(f"round {number + 1}", *(f"{name} {values[-1]:.2f} s" for name, values in found.items()), flush=True)
    for name, values in found.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name}: {statistics.median(values):.2f} s a job beyond load, warm-up and clock ({spread})")


if __name__ == "__main__":
    main()
