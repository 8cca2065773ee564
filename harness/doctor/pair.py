"""One of two processes that add numbers together: ``python -m harness.doctor.pair BACKEND DEVICE``.

It reads a JSON line for each sum that it is to take part in, and writes one about how that went.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from datetime import timedelta
from typing import Any

from harness.basics.errors import one_line
from harness.doctor.probe import own_output, say

ELEMENTS = 1024  # float32, of the sum that is checked
MEASURED = 2**24  # float32, 64 MiB, of the one that is timed between GPUs
TIMES = 3


def main(words: list[str]) -> int:
    """Takes part in sums until nobody asks any more; returns the exit status."""
    backend, device = words
    out = own_output()
    import torch.distributed

    assert torch.distributed.is_available()
    say(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = _together(backend, device, asked)
        except Exception as error:  # torch's, NCCL's, gloo's
            answer = {"error": one_line(str(error) or type(error).__name__, 300)}
        say(out, answer)
    return 0


def _together(backend: str, device: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Joins the other process, adds 1 and 2 with it, and between GPUs times a larger sum."""
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):  # not before: a GPU may be set to take one process at a time
        torch.cuda.set_device(device)
    rank, limit = asked["rank"], timedelta(seconds=asked["limit_s"])
    address = f"tcp://127.0.0.1:{asked['port']}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=limit)
    try:
        numbers = torch.full((ELEMENTS,), float(rank + 1), device=device)
        dist.all_reduce(numbers)
        if not bool((numbers == 3).all()):
            return {"error": f"1 + 2 came out as {float(numbers[0])}"}
        return {"error": None} | (_rate(device) if device.startswith("cuda") else {})
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _rate(device: str) -> dict[str, float]:
    """Returns the best rate, in bytes of the sum a second: each of two GPUs sends, and receives, that many."""
    import torch
    import torch.distributed as dist

    data, best = torch.zeros(MEASURED, device=device), float("inf")
    for _ in range(1 + TIMES):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(data)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return {"bytes_per_s": data.numel() * data.element_size() / best}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
