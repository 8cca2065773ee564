"""The machine's rate of matrix products on a model's shapes: python matrix_rate.py MODEL DTYPE CORES

One process a core, pinned, all at once. Each multiplies 64 to 512 rows with weights of every shape that a layer and the
output head have, through torch's oneDNN, as given and packed beforehand; its rate is the best of all these.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.models.architecture import attention_heads

ROWS = (64, 128, 256, 512)
SECONDS = 0.12  # for each shape


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
    kind = getattr(torch, dtype)
    best = 0.0
    together.wait()
    with torch.inference_mode():
        for columns, depth in shapes(architecture):
            weights = torch.randn(columns, depth).to(kind)
            for rows in ROWS:
                activations = torch.randn(rows, depth).to(kind)
                ways: list[Callable[[], Any]] = [partial(torch.nn.functional.linear, activations, weights)]
                if kind is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
                    packed = torch.ops.mkldnn._reorder_linear_weight(weights, rows)
                    pointwise = torch.ops.mkldnn._linear_pointwise
                    ways.append(partial(pointwise, activations, packed, None, "none", [], ""))
                for multiply in ways:
                    multiply()
                    until = time.perf_counter() + SECONDS
                    while (started := time.perf_counter()) < until:
                        multiply()
                        best = max(best, 2 * rows * columns * depth / (time.perf_counter() - started) / 1e9)
    answers.put(best)


def main() -> None:
    """Prints the sum of the cores' rates."""
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


if __name__ == "__main__":
    main()
