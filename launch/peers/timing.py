"""What the programs in this folder share: their arguments, and how an engine is timed."""

import json
import sys
import time


def arguments():
    """Returns MODEL, the requests (prompt ids, output length), DTYPE and CORES from the command line."""
    model, requests_file, dtype, cores = sys.argv[1:]
    with open(requests_file) as file:
        return model, json.load(file), dtype, cores


def measure(generate, requests):
    """Warms ``generate`` up, times it on all requests and prints the figures; it returns each request's ids."""
    generate([(ids[:32], 4) for ids, _ in requests[:4]])
    started = time.perf_counter()
    outputs = generate(requests)
    seconds = time.perf_counter() - started
    wrong = sum(len(ids) != length for ids, (_, length) in zip(outputs, requests, strict=True))
    print(json.dumps({"seconds": seconds, "wrong_length": wrong}), flush=True)
