"""What the host costs a pass of FastGen, and what of it the device has to wait for. No model, no GPU.

    python launch/bench_host.py [--sequences 512] [--budget 4096] [--queued 10000] [--passes 1000]

The first table has milliseconds of the host a pass, for passes of decodes alone and for those with prompts beside
them: to schedule it, to plan it as the Triton kernels need it and copy that to the device (here a copy in memory), and
to keep the books (placeholders, ids, ends, statistics). The second runs the engine itself before a stand-in for a
device, whose passes take --pass-ms on a thread of its own, and shows how long that has nothing to do between two of
them: with a pass launched ahead (depth 1) and without (depth 0). Requests have the challenge's shape: lognormal
lengths, 4 to 1024 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import queue
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_scheduler import lengths

from harness.basics.clock import Clock
from harness.config.schema import GenerationConfig, Stop
from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.engine import FastGenEngine
from harness.engines.fastgen.ledger import Ledger
from harness.engines.fastgen.loop import Loop
from harness.engines.fastgen.runners.base import Wait
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.models.source import Source
from harness.models.tokenizer import ByteTokenizer
from harness.workload.records import Request

BLOCK_SIZE, BLOCKS, CONTEXT = 64, 20_000, 2048
TOKEN = 5  # what every pass gives; no stop id
WARM = 200  # passes that only fill the batch


def new_engine(budget: int, sequences: int) -> FastGenEngine:
    """Returns an engine that has no model."""
    settings = EngineSettings(
        engine=FastGenConfig(kernels=Kernels.torch, token_budget=budget, max_sequences=sequences),
        generation=GenerationConfig(stop=Stop.length),
        source=Source("dummy", None, None, None, {"model_type": "llama"}, False),
        dtype="bfloat16",
        device="cpu",
        max_context=CONTEXT,
    )
    engine = FastGenEngine(settings)
    engine.tokenizer, engine.total_blocks = ByteTokenizer(), BLOCKS
    return engine


def new_planner(budget: int, sequences: int) -> Any:
    """Returns what plans the Triton kernels' passes, for a device that is the host's memory; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    import torch

    from harness.engines.fastgen.runners.triton.plan import Limits, Planner

    width = CONTEXT // BLOCK_SIZE
    limits = Limits(budget, sequences, BLOCKS, BLOCK_SIZE, width=width, group=8, vocab=32_000)
    return Planner(limits, torch.device("cpu"))


def requests(count: int) -> Iterator[Request]:
    """Yields so many requests, the same ones each time."""
    rng = random.Random(0)
    for index in range(count):
        prompt, output = lengths(rng)
        yield Request(index, "", output, prompt_ids=(TOKEN,) * prompt)


class Stopwatch:
    """A runner of depth 1 that plans passes and computes nothing; it times that, and who calls it since :meth:`start`.

    Args:
        planner: of the Triton kernels' passes; None where Triton is not installed.
    """

    depth = 1

    def __init__(self, planner: Any) -> None:
        self.planner = planner
        self.parts: dict[str, list[float]] = {"schedule": [], **({"plan": []} if planner else {}), "books": []}
        self.decodes: list[bool] = []  # of each pass, whether it has no prompts
        self._at = 0.0

    def start(self) -> None:
        """The books are closed, and the next pass is about to be scheduled."""
        self._lap("books")
        self._at = time.perf_counter()

    def launch(self, batch: RaggedBatch) -> Wait:
        """Takes the time of scheduling, and of planning."""
        self._lap("schedule")
        if self.planner is not None:
            self._at = time.perf_counter()
            self.planner.plan(batch)
            self.planner.send()
            self._lap("plan")
        self.decodes.append(batch.prompt_tokens == 0)
        ids = [TOKEN] * batch.rows
        self._at = time.perf_counter()
        return lambda: ids

    def free(self, sequence: Sequence) -> None:
        """There is nothing to free."""

    def _lap(self, name: str) -> None:
        self.parts[name].append(time.perf_counter() - self._at)


def print_costs(sequences: int, budget: int, queued: int, passes: int) -> None:
    """Prints what the host does in a pass, a line for each kind of pass and part of the work."""
    engine, watch = new_engine(budget, sequences), Stopwatch(new_planner(budget, sequences))
    runner: Any = watch
    scheduler = Scheduler(budget, sequences, KvBlocks(BLOCKS, BLOCK_SIZE))
    source = requests(sys.maxsize)

    def submit() -> None:
        while len(scheduler.waiting) < queued:
            request = next(source)
            ids = list(request.prompt_ids or ())
            scheduler.submit(Sequence(request.index, ids, len(ids), request.output_len or 1))
        watch.start()

    ledger = Ledger(engine)
    for computed in itertools.islice(Loop(runner, scheduler, Clock()).passes(submit), passes + WARM):
        ledger.book(computed)
    print(f"host, ms a pass: {sequences} sequences, token budget {budget}, {queued} queued")
    print("kind      passes  part        median     p99")
    parts = {name: times[-passes:] for name, times in watch.parts.items()}
    parts["all"] = [sum(times) for times in zip(*parts.values(), strict=True)]
    for kind, decodes in (("decodes", True), ("mixed", False)):
        of_kind = [place for place, alone in enumerate(watch.decodes[-passes:]) if alone == decodes]
        for name, times in parts.items() if len(of_kind) > 1 else ():
            ms = [times[place] * 1e3 for place in of_kind]
            p99 = statistics.quantiles(ms, n=100)[98]
            print(f"{kind:8s}  {len(ms):6d}  {name:10s}  {statistics.median(ms):6.3f}  {p99:6.3f}")


class Device:
    """A stand-in for a device: it takes ``pass_s`` a pass, one after the other, and needs no time between two.

    Its time is its own: a thread that is late hands over ids late, but has not lengthened the pass.
    """

    name, every_token, block_size, device_time = "stand-in", False, BLOCK_SIZE, None

    def __init__(self, depth: int, pass_s: float) -> None:
        self.depth = depth
        self.pass_s = pass_s
        self.gaps: list[float] = []
        self._jobs: queue.SimpleQueue[tuple[float, int, Future[list[int]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def stop_ids(self) -> frozenset[int]:
        """There are none."""
        return frozenset()

    def free(self, sequence: Sequence) -> None:
        """There is nothing to free."""

    def launch(self, batch: RaggedBatch) -> Wait:
        """Hands a pass to the device; without depth, waits for it."""
        future: Future[list[int]] = Future()
        self._jobs.put((time.perf_counter(), batch.rows, future))
        if not self.depth:
            future.result()
        return future.result

    def _run(self) -> None:
        ended = None
        while (job := self._jobs.get()) is not None:
            launched, rows, future = job
            begun = launched if ended is None else max(launched, ended)
            self.gaps.append(begun - (ended or begun))
            ended = begun + self.pass_s
            time.sleep(max(0.0, ended - time.perf_counter()))
            future.set_result([TOKEN] * rows)


def print_gaps(sequences: int, budget: int, queued: int, passes: int, pass_s: float) -> None:
    """Prints how long the device waits for the host between two passes, a line for each depth."""
    print(f"gap between two passes of {pass_s * 1e3:g} ms, in ms: {sequences} sequences, {queued} requests queued")
    print("depth  passes  median    mean     p99")
    for depth in (1, 0):
        engine, device = new_engine(budget, sequences), Device(depth, pass_s)
        runner: Any = device
        engine.runner = runner
        generated: Any = engine.generate(requests(queued), Clock())
        while len(device.gaps) < passes + WARM and next(generated, None) is not None:
            pass
        generated.close()
        device.close()
        ms = [gap * 1e3 for gap in device.gaps[WARM:][:passes]]
        p99 = statistics.quantiles(ms, n=100)[98]
        print(f"{depth:5d}  {len(ms):6d}  {statistics.median(ms):6.3f}  {statistics.fmean(ms):6.3f}  {p99:6.3f}")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=1000)
    parser.add_argument("--device-sequences", type=int, default=256)
    parser.add_argument("--device-passes", type=int, default=300)
    parser.add_argument("--pass-ms", type=float, default=10.0)
    options = parser.parse_args()
    print_costs(options.sequences, options.budget, options.queued, options.passes)
    print_gaps(options.device_sequences, options.budget, options.queued, options.device_passes, options.pass_ms / 1e3)


if __name__ == "__main__":
    main()
