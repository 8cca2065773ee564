"""What a sweep costs beyond its jobs: seconds a job that are not load, warm-up or the run's clock.

    python launch/bench_sweep.py [--jobs 8] [overrides ...]

Runs a sweep of that many jobs that differ in dataset.seed alone, and the same job by itself (python harness/main.py),
in turn. Beyond a job lie the imports of the launcher and of the rank, the row, and the end of the processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.runs_table import read_rows  # noqa: E402


def beyond(words: list[str], results: Path) -> float:
    """Runs ``harness/main.py``; returns the seconds beyond its jobs, for each of them."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "harness/main.py", *words, f"results_dir={results}"], cwd=ROOT, capture_output=True, text=True
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
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    overrides = overrides or ["dataset.num_samples=4"]
    seeds = ",".join(str(seed) for seed in range(options.jobs))
    found: dict[str, list[float]] = {"in a sweep": [], "by itself": []}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            found["in a sweep"].append(beyond(["-m", *overrides, f"dataset.seed={seeds}"], Path(directory) / "sweep"))
            found["by itself"].append(beyond(overrides, Path(directory) / "single"))
        print(f"round {number + 1}", *(f"{name} {values[-1]:.2f} s" for name, values in found.items()), flush=True)
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.2f} s a job beyond load, warm-up and clock")


if __name__ == "__main__":
    main()
