"""How far predictions are off: two runs are fitted, eight other settings predicted, and only then run.

    python launch/bench_plan.py [--requests 200] [--dataset FILE] [--results DIR] [overrides ...]

Needs a dataset=asc24 file of twice as many records. The two runs have the first requests at a token budget of 256, and
of 512 with two replicas; the others are token budgets of 64, 128, 512 and 1024, 16 sequences, a budget of 192 with two
replicas, the dataset's order, and the next requests of the file. Predictions are engine=simulate with hardware=local,
which --fit writes. Overrides go to all of them, generation.stop=length for instance, where outputs are as long as the
file says; with the default stop rule their lengths are drawn from the two runs' ends.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from harness.results.table import read_rows

FITTED = (("engine.token_budget=256",), ("engine.token_budget=512", "parallel.dp=2"))
OTHER = "the next requests"
PREDICTED: dict[str, tuple[str, ...]] = {
    **{f"engine.token_budget={budget}": (f"engine.token_budget={budget}",) for budget in (64, 128, 512, 1024)},
    "engine.max_sequences=16": ("engine.max_sequences=16",),
    "token_budget=192, dp=2": ("engine.token_budget=192", "parallel.dp=2"),
    "engine.order=dataset": ("engine.order=dataset",),
    OTHER: (),
}


def split(dataset: Path, requests: int, directory: Path) -> tuple[Path, Path]:
    """Writes the first and the next requests of a file to files of their own."""
    content = gzip.decompress(dataset.read_bytes()) if dataset.suffix == ".gz" else dataset.read_bytes()
    records = json.loads(content)
    if len(records) < 2 * requests:
        sys.exit(f"{dataset} has {len(records)} records, {2 * requests} are needed")
    files = directory / "first.json", directory / "next.json"
    for number, path in enumerate(files):
        path.write_text(json.dumps(records[number * requests : (number + 1) * requests]))
    return files


def launched(words: list[str], results: Path) -> dict[str, str]:
    """Runs ``harness/main.py`` and returns its row."""
    started = time.monotonic()
    command = [sys.executable, "harness/main.py", "dataset=asc24", *words, f"results_dir={results}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    row = read_rows(results / "runs.csv")[-1]
    rate = float(row["total_tokens_per_s"])
    said = " ".join(word for word in words if not word.startswith(("dataset", "hardware")))
    print(f"  {said:<60} {rate:>10,.1f} tok/s, {time.monotonic() - started:,.0f} s", flush=True)
    return row


def main() -> None:
    """Prints predictions and measurements side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--dataset", type=Path, default=ROOT.parent / "shared" / "data" / "asc24_like_10k.json.gz")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench_plan", help="where the runs are kept")
    options, overrides = parser.parse_known_args()
    results: Path = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    first, following = split(options.dataset, options.requests, results)
    print("two runs", flush=True)
    fitted = [launched([f"dataset.path={first}", *words, *overrides], results)["run_id"] for words in FITTED]
    command = [sys.executable, "-m", "harness.plan", "--fit", *fitted, "--results-dir", str(results)]
    subprocess.run(command, cwd=ROOT, check=True)
    rates: dict[str, list[float]] = {name: [] for name in PREDICTED}
    for title, engine in (("predictions", ["engine=simulate", "hardware=local"]), ("runs", [])):
        print(title, flush=True)
        for name, words in PREDICTED.items():
            path = following if name == OTHER else first
            row = launched([f"dataset.path={path}", *engine, *words, *overrides], results)
            rates[name].append(float(row["total_tokens_per_s"]))
    print(f"\n{'total tokens/s':<28} {'predicted':>10} {'measured':>10} {'error':>8}")
    errors = []
    for name, (predicted, measured) in rates.items():
        errors.append(abs(predicted / measured - 1))
        print(f"{name:<28} {predicted:>10,.1f} {measured:>10,.1f} {predicted / measured - 1:>+8.1%}")
    print(f"{'median, highest':<28} {statistics.median(errors):>10.1%} {max(errors):>10.1%}")


if __name__ == "__main__":
    main()
