"""Compares engines side by side: the same requests, the same cores, in turn, the median of several rounds.

    python launch/bench_engines.py [--engines baseline fastgen] [--cores 0,1] [--rounds 3] [overrides ...]

Every run is a normal one (python harness/main.py ...) pinned to --cores with as many OpenMP threads; its
row goes to --results/runs.csv, from which the table is made. The first engine is the one compared with.
Nothing else should run meanwhile: a busy second core makes OpenMP with two threads ten times slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.runs_table import read_rows  # noqa: E402


def run(engine: str, overrides: list[str], cores: str, results: Path) -> dict[str, str]:
    """Runs one job to its end and returns its row; ends the program if the job failed."""
    threads = str(len(cores.split(",")))
    command = [sys.executable, "harness/main.py", f"engine={engine}", f"results_dir={results}", *overrides]
    done = subprocess.run(
        ["taskset", "-c", cores, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}")
    return read_rows(results / "runs.csv")[-1]


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["baseline", "fastgen"])
    parser.add_argument("--cores", default="0", help="comma-separated, as taskset takes them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench")
    options, overrides = parser.parse_known_args()
    rows: dict[str, list[dict[str, str]]] = {engine: [] for engine in options.engines}
    for number in range(options.rounds):
        for engine in options.engines:
            row = run(engine, overrides, options.cores, options.results)
            rows[engine].append(row)
            load = os.getloadavg()[0]
            print(
                f"round {number + 1}  {engine:12s} {float(row['total_tokens_per_s']):8.1f} total tokens/s  "
                f"({row['total_tokens']} tokens in {float(row['elapsed_s']):.1f} s, load average {load:.1f})",
                flush=True,
            )
    first = statistics.median(float(row["total_tokens_per_s"]) for row in rows[options.engines[0]])
    sample = rows[options.engines[0]][0]
    print(
        f"\n{sample['model']} {sample['dtype']}, {sample['dataset']} ({sample['requests']} requests), "
        f"stop={sample['stop']}, cores {options.cores}, {sample['device_name']}, median of {options.rounds}"
    )
    print("engine         total tok/s   output tok/s   ratio")
    for engine, found in rows.items():
        total, output = (
            statistics.median(float(row[f"{kind}_tokens_per_s"]) for row in found) for kind in ("total", "output")
        )
        print(f"{engine:14s} {total:11.1f}   {output:12.1f}   {total / first:5.2f}")


if __name__ == "__main__":
    main()
