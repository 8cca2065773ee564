"""What sampling costs a run: the share of a core that the sampler's thread takes, and the time of one sample.

    python launch/bench_telemetry.py [--rounds 3] [overrides ...]

Runs the job (python harness/main.py, by default 16 requests of the sample) and takes telemetry.sampler_cpu_share from
its records; then samples this host without a pause, GPUs included, for the CPU and the elapsed time of a sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import psutil

from harness.basics.clock import Clock
from harness.machine import device, telemetry
from harness.machine.energy import bus_ids


def share(overrides: list[str], results: Path) -> tuple[float, float]:
    """Runs a job; returns the sampler's share of a core within the clock, and the clock's seconds."""
    command = [sys.executable, "harness/main.py", *overrides, f"results_dir={results}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}")
    (path,) = results.glob("*/record.json")
    record = json.loads(path.read_text())
    return record["telemetry"]["sampler_cpu_share"], record["elapsed_s"]


def one_sample(series: Path, seconds: float = 3.0) -> tuple[float, float, int]:
    """Returns the CPU and the elapsed seconds of a sample, and of how many GPUs."""
    gpus = bus_ids(None) if device.accelerator() == "cuda" else []
    sampler = telemetry.Sampler(series, gpus, [psutil.Process()], interval_s=0.0)
    sampler.start()
    time.sleep(1.0)  # for NVML to be opened
    clock = Clock()
    sampler.clock_started(clock)
    time.sleep(seconds)
    sampler.stop()
    elapsed = clock()
    summary = sampler.summary(elapsed)
    each = elapsed / summary["samples"]
    return summary["sampler_cpu_share"] * each, each, len(summary["gpus"])


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    shares = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            part, elapsed = share(overrides or ["dataset.num_samples=16"], Path(directory))
        shares.append(part)
        print(f"round {number + 1}: {part:.4%} of a core in a run of {elapsed:.1f} s", flush=True)
    print(f"median: {statistics.median(shares):.4%} of a core at a sample every {telemetry.INTERVAL_S:g} s")
    with tempfile.TemporaryDirectory() as directory:
        cpu_s, each_s, gpus = one_sample(Path(directory) / telemetry.SERIES)
    print(f"one sample with {gpus} GPUs, without a pause: {cpu_s * 1e3:.3f} ms of CPU, {each_s * 1e3:.3f} ms elapsed")


if __name__ == "__main__":
    main()
