"""Compares runs side by side: the same requests, in turn, the median of several rounds.

    python launch/bench_engines.py --cores 0,1 [overrides ...]               # engine=baseline and engine=fastgen
    python launch/bench_engines.py --variant "cores=0 parallel.dp=1" --variant "cores=0,1 parallel.dp=2" [overrides ...]
    python launch/bench_engines.py --variant "checkout=../before" --variant "" [overrides ...]   # another commit's code

A variant is a string of overrides; the others come from the end of the command line. Every run is a normal one
(python harness/main.py ...) pinned to --cores, or to the variant's own cores=...; its row goes to --results/runs.csv,
from which the table is made. The first variant is the one compared with. Nothing else should run meanwhile.
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

from harness.results.table import read_rows


def run(variant: str, overrides: list[str], cores: str, results: Path) -> dict[str, str]:
    """Runs one job to its end and returns its row; ends the program if the job failed."""
    words = variant.split()
    own = [word for word in words if not word.startswith(("cores=", "checkout="))]
    cores = next((word.removeprefix("cores=") for word in words if word.startswith("cores=")), cores)
    checkout = next((Path(word.removeprefix("checkout=")) for word in words if word.startswith("checkout=")), ROOT)
    command = [sys.executable, "harness/main.py", *overrides, *own, f"results_dir={results.resolve()}"]
    done = subprocess.run(["taskset", "-c", cores, *command], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}")
    return read_rows(results / "runs.csv")[-1]


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="its own overrides in one string; give two or more")
    parser.add_argument("--cores", default="0", help="comma-separated, as taskset takes them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench")
    options, overrides = parser.parse_known_args()
    variants = options.variant or ["engine=baseline", "engine=fastgen"]
    rows: dict[str, list[dict[str, str]]] = {variant: [] for variant in variants}
    width = max(len(variant) for variant in rows)
    for number in range(options.rounds):
        for variant in rows:
            row = run(variant, overrides, options.cores, options.results)
            rows[variant].append(row)
            load = os.getloadavg()[0]
            print(
                f"round {number + 1}  {variant:{width}}  {float(row['total_tokens_per_s']):8.1f} total tokens/s  "
                f"({row['total_tokens']} tokens in {float(row['elapsed_s']):.1f} s, load average {load:.1f})",
                flush=True,
            )
    first = statistics.median(float(row["total_tokens_per_s"]) for row in rows[variants[0]])
    sample = rows[variants[0]][0]
    print(
        f"\n{sample['model']} {sample['dtype']}, {sample['dataset']} ({sample['requests']} requests), "
        f"stop={sample['stop']}, cores {options.cores} unless said, {sample['device_name']}, median of {options.rounds}"
    )
    print(f"{'variant':{width}}   total tok/s   output tok/s   ratio")
    for variant, found in rows.items():
        total, output = (
            statistics.median(float(row[f"{kind}_tokens_per_s"]) for row in found) for kind in ("total", "output")
        )
        print(f"{variant:{width}}   {total:11.1f}   {output:12.1f}   {total / first:5.2f}")


if __name__ == "__main__":
    main()
