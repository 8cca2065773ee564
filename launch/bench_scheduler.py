"""What the FastGen scheduler costs a pass while requests are queued behind it. No model, no device.

    python launch/bench_scheduler.py [--queued 500 2000 10000] [--budget 512] [--sequences 64] [--prefix-sharing]

The job list has the challenge's shape: prompt and output lengths lognormal, 4 to 1024 tokens. The queue is
kept at its length while it is measured: a finished request is replaced by a new one. With --prefix-sharing blocks can
be shared; but no two prompts begin alike, so that what this costs is seen, and no gain.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.engines.fastgen.batch import Sequence
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks, SharedKvBlocks


def lengths(rng: random.Random) -> tuple[int, int]:
    """Draws prompt and output tokens."""
    prompt = min(1024, max(4, round(rng.lognormvariate(4.72, 1.0))))
    output = min(1024, max(4, round(rng.lognormvariate(5.01, 0.95))))
    return prompt, output


def measure(queued: int, budget: int, sequences: int, passes: int, sharing: bool) -> tuple[float, float, float, float]:
    """Returns mean and 99th percentile of the milliseconds a pass, its mean sequences, and microseconds a submit."""
    rng = random.Random(0)
    scheduler = Scheduler(budget, sequences, (SharedKvBlocks if sharing else KvBlocks)(20_000, 64))
    made, submitting = 0, 0.0

    def fill() -> None:
        nonlocal made, submitting
        while len(scheduler.waiting) < queued:
            prompt, output = lengths(rng)
            sequence = Sequence(made, [made] * prompt, prompt, output)
            started = time.perf_counter()
            scheduler.submit(sequence)
            submitting += time.perf_counter() - started
            made += 1

    fill()
    times = []
    width = 0
    for number in range(passes + 200):
        started = time.perf_counter()
        batch = scheduler.schedule()
        planned = time.perf_counter()
        tokens = [1] * batch.rows  # the model's part, not the scheduler's
        computed = time.perf_counter()
        scheduler.complete(batch, tokens)
        ended = time.perf_counter()
        fill()
        if number >= 200:  # the first passes only fill the batch
            times.append((planned - started + ended - computed) * 1e3)
            width += len(batch.chunks)
    return statistics.fmean(times), statistics.quantiles(times, n=100)[98], width / passes, submitting / made * 1e6


def main() -> None:
    """Prints one line a queue length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, nargs="+", default=[500, 2_000, 10_000])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3000)
    parser.add_argument("--prefix-sharing", action="store_true")
    options = parser.parse_args()
    print(f"token budget {options.budget}, at most {options.sequences} sequences, {options.passes} passes")
    print("queued   mean ms/pass   p99 ms/pass   sequences/pass   us/submit")
    for queued in options.queued:
        sizes = options.budget, options.sequences, options.passes, options.prefix_sharing
        mean, high, width, submit = measure(queued, *sizes)
        print(f"{queued:6d}   {mean:12.4f}   {high:11.4f}   {width:14.1f}   {submit:9.1f}")


if __name__ == "__main__":
    main()
