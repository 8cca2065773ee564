"""How far predictions are off: two runs are fitted, eight other settings predicted, and only then run.

    python launch/bench_plan.py [--requests 200] [--rounds 3] [--dataset FILE] [--results DIR] [overrides ...]

Needs a dataset=asc24 file of twice as many records. The two runs have the first requests at a token budget of 256, and
of 512 with two replicas; the others are token budgets of 64, 128, 512 and 1024, 16 sequences, a budget of 192 with two
replicas, the dataset's order, and the next requests of the file. Predictions are engine=simulate with hardware=local,
which --fit writes. Overrides go to all of them, generation.stop=length for instance, where outputs are as long as the
file says; with the default stop rule their lengths are drawn from the two runs' ends.

A prediction is of the machine as it was while it was fitted, and a shared machine's speed drifts by more than the
errors looked for. So every round runs the first fitted setting again before the others: the error is given as it is,
and with that drift taken out (the prediction times the setting's rate in that round over its rate when fitted), each
the median of the rounds.
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
    parser.add_argument("--rounds", type=int, default=1, help="how often the eight settings are run, in turn")
    parser.add_argument("--dataset", type=Path, default=ROOT.parent / "shared" / "data" / "asc24_like_10k.json.gz")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench_plan", help="where the runs are kept")
    options, overrides = parser.parse_known_args()
    results: Path = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    first, following = split(options.dataset, options.requests, results)
    print("two runs", flush=True)
    two = [launched([f"dataset.path={first}", *words, *overrides], results) for words in FITTED]
    command = [sys.executable, "-m", "harness.plan", "--fit", *(row["run_id"] for row in two)]
    subprocess.run([*command, "--results-dir", str(results)], cwd=ROOT, check=True)

    def rate(name: str, *engine: str) -> float:
        words = [f"dataset.path={following if name == OTHER else first}", *engine, *PREDICTED[name], *overrides]
        return float(launched(words, results)["total_tokens_per_s"])

    print("predictions", flush=True)
    predicted = {name: rate(name, "engine=simulate", "hardware=local") for name in PREDICTED}
    measured: dict[str, list[float]] = {name: [] for name in PREDICTED}
    drifts: list[float] = []
    for number in range(options.rounds):
        print(f"runs, round {number + 1}", flush=True)
        again = launched([f"dataset.path={first}", *FITTED[0], *overrides], results)
        drifts.append(float(again["total_tokens_per_s"]) / float(two[0]["total_tokens_per_s"]))
        for name in PREDICTED:
            measured[name].append(rate(name))
    report(predicted, measured, drifts)


def report(predicted: dict[str, float], measured: dict[str, list[float]], drifts: list[float]) -> None:
    """Prints a line a setting, and the errors' median and highest.

    Args:
        predicted: total tokens/s by setting.
        measured: the same of each round.
        drifts: of each round, how fast the machine was against the time of the fit.
    """
    print(f"\nthe machine's speed against the fit's, by round: {', '.join(f'{drift:.3f}' for drift in drifts)}")
    print(f"{'total tokens/s':<28} {'predicted':>10} {'measured':>10} {'error':>8} {'without drift':>14}")
    raw, steady = [], []
    for name, rates in measured.items():
        raw.append(statistics.median(predicted[name] / each - 1 for each in rates))
        pairs = zip(rates, drifts, strict=True)
        steady.append(statistics.median(predicted[name] * drift / each - 1 for each, drift in pairs))
        rate = statistics.median(rates)
        print(f"{name:<28} {predicted[name]:>10,.1f} {rate:>10,.1f} {raw[-1]:>+8.1%} {steady[-1]:>+14.1%}")
    for title, pick in (("median of the errors", statistics.median), ("highest", max)):
        print(f"{title:<50} {pick(map(abs, raw)):>8.1%} {pick(map(abs, steady)):>14.1%}")


if __name__ == "__main__":
    main()
