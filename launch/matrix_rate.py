"""The machine's rate of matrix products: python matrix_rate.py MODEL DTYPE CORES, or python matrix_rate.py DTYPE

On a model's shapes: one process a core, pinned, all at once. Each multiplies 64 to 512 rows with weights of every shape
that a layer and the output head have, through torch's oneDNN, as given and packed beforehand; its rate is the best of
all these. With a type alone: measures anew what runs with hardware=cpu take for this process's cores, and keeps it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.machine import probe
from harness.models.architecture import attention_heads

ROWS = (64, 128, 256, 512)
SECONDS = 0.12  # for each shape and way
DTYPES = ("float32", "bfloat16", "float16")


def shapes(architecture: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns (columns, depth) of the query-key-value, output, gate-up, down and head weights."""
    hidden, intermediate = architecture["hidden_size"], architecture["intermediate_size"]
    heads, kv_heads, head_dim = attention_heads(architecture)
    return [
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * intermediate, hidden),
        (hidden, intermediate),
        (architecture["vocab_size"], hidden),
    ]


def best_rate(core: int, architecture: dict[str, Any], dtype: str, together: Any, answers: Any) -> None:
    """Puts this core's best rate into ``answers``, GFLOP/s."""
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    together.wait()
    products = [(rows, columns, depth) for columns, depth in shapes(architecture) for rows in ROWS]
    answers.put(probe.matrix_rate(dtype, products, SECONDS) / 1e9)


def main() -> int:
    """Prints the sum of the cores' rates, or what was measured for hardware=cpu; returns the exit status."""
    if len(sys.argv) == 2:
        return measure(sys.argv[1])
    model, dtype, cores = sys.argv[1:]
    architecture = json.loads(Path(model, "config.json").read_text())
    context = multiprocessing.get_context("spawn")
    numbers = [int(core) for core in cores.split(",")]
    together, answers = context.Barrier(len(numbers)), context.Queue()
    workers = [context.Process(target=best_rate, args=(n, architecture, dtype, together, answers)) for n in numbers]
    for worker in workers:
        worker.start()
    rates = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    print(json.dumps({"gflops": sum(rates), "cores": rates}))
    return 0


def measure(dtype: str) -> int:
    """Measures this process's cores, as a run's only rank has them, keeps the figures and prints them."""
    if dtype not in DTYPES:
        print(f"error: DTYPE: {dtype!r}; give one of {', '.join(DTYPES)}", file=sys.stderr)
        return 2
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps(asdict(probe.figures(dtype, anew=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
