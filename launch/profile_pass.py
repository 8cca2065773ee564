"""What one pass of FastGen spends its time on: PyTorch's profiler around a decode pass and a mixed one.

    python launch/profile_pass.py [--out DIR] [--decodes N] [--context N] [--prompt N] [overrides ...]

The overrides are those of harness/main.py, with engine=fastgen on one device; no run is recorded. The engine is loaded
and warmed as for a run. Then N sequences of --context tokens are brought into its cache, and two passes are profiled:
one in which each of them decodes a token, and one in which prompts of --prompt tokens fill what these leave of
engine.token_budget. Printed are the kernels (on a CPU the operators) by the time that they took themselves; before, the
pass is timed without the profiler. DIR gets a trace of each, NAME.json.gz for ui.perfetto.dev, and profile.json. Of the
native kernels, a pass of which is one call, the stages are printed, which a library compiled for it takes the time of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.basics.command import positive
from harness.basics.errors import UserError, report
from harness.config.compose import compose
from harness.engines import catalogue
from harness.engines.fastgen.batch import RaggedBatch
from harness.engines.fastgen.batch import Sequence as Request
from harness.engines.fastgen.runners.native import build
from harness.engines.fastgen.scheduler import Scheduler
from harness.engines.shared.kv_blocks import KvBlocks
from harness.ranks.rank import Rank
from harness.running import job as jobs
from harness.running import setup

TIMED = 5  # passes of a kind without the profiler
STEPS = 64  # tokens that a sequence may still get: more than there are passes
TOP = 15  # lines of a table
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Kernel:
    """A kernel, or on a CPU an operator, of one pass: how often it ran, and how long by itself."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """One pass.

    Attributes:
        seconds: without the profiler, median, from its launch until its ids have come.
        busy_s: of the device, with the profiler: all kernels, each moment once; None on a CPU.
        span_s: from the first kernel's begin to the last one's end; None on a CPU.
        kernels: that it ran, the longest first.
    """

    name: str
    tokens: int
    decodes: int
    prompt_tokens: int
    sequences: int
    keys_read: int
    seconds: float
    busy_s: float | None
    span_s: float | None
    kernels: list[Kernel]

    @property
    def kernel_s(self) -> float:
        """Of all kernels together."""
        return sum(kernel.seconds for kernel in self.kernels)

    def share(self, kernel: Kernel) -> float:
        """Returns the part of all kernels' time that one takes."""
        return kernel.seconds / self.kernel_s if self.kernel_s else 0.0


class Passes:
    """Passes of an engine that is loaded, one at a time: each is waited for before the next is scheduled."""

    def __init__(self, engine: Any) -> None:
        settings = engine.settings.engine
        self.runner = engine.runner
        blocks = KvBlocks(engine.total_blocks, self.runner.block_size)
        most = min(settings.max_sequences, settings.token_budget)
        self.scheduler = Scheduler(settings.token_budget, most, blocks)
        self._made = 0

    def submit(self, prompt: int, outputs: int = STEPS) -> None:
        """Queues a prompt of so many tokens, of many kinds: of one alone a GPU takes less power, and less time."""
        ids = [3 + (31 * self._made + 7 * place) % 250 for place in range(prompt)]
        self.scheduler.submit(Request(self._made, ids, prompt, outputs))
        self._made += 1

    def step(self) -> RaggedBatch:
        """Schedules and computes a pass, and returns it once its ids have come."""
        scheduler, runner = self.scheduler, self.runner
        batch = scheduler.schedule()
        for sequence in scheduler.preempted:
            runner.free(sequence)
        wait = runner.launch(batch)
        scheduler.launched(batch)
        for sequence in scheduler.collect(batch, wait()):
            runner.free(sequence)
        return batch

    def room(self, context: int, prompts: int, prompt: int) -> int:
        """Returns how many sequences of ``context`` tokens have room in the cache beside so many prompts."""
        blocks, scheduler = self.scheduler.blocks, self.scheduler
        beside = prompts * (blocks.needed(prompt + 1) + 1)
        fitting = (blocks.total - beside) // (blocks.needed(context + STEPS) + 1)
        return min(fitting, scheduler.max_sequences - prompts, scheduler.token_budget - 1)


def profiles(engine: Any, decodes: int | None, context: int, prompt: int) -> list[tuple[Profile, Any]]:
    """Returns a decode pass and a mixed one, each with torch's own profile of it.

    Args:
        engine: FastGen's, loaded and warm.
        decodes: sequences that decode; None for as many as there is room for, at most half of a pass's tokens.
        context: tokens of each.
        prompt: tokens of the prompts beside them, at most.

    Raises:
        UserError: there is no room for one sequence.
    """
    passes = Passes(engine)
    budget = passes.scheduler.token_budget
    beside = -(-(budget - 1) // prompt)  # prompts of a mixed pass; they end with it
    most = passes.room(context, beside, prompt)
    if most < 1:  # of a small cache: prompts that leave a pass unfilled
        beside, most = 1, passes.room(context, 1, prompt)
    count = min(most, decodes or max(1, budget // 2))
    if count < 1:
        found = f"{passes.scheduler.blocks.total} blocks of KV cache do not hold a sequence of {context} tokens"
        raise UserError("--context", f"{found} beside the prompts", "lower it or --prompt, or raise engine.kv_memory")
    for _ in range(count):
        passes.submit(context)
    while passes.step().prompt_tokens:
        pass

    def decode() -> RaggedBatch:
        return passes.step()

    def mixed() -> RaggedBatch:
        room = budget - len(passes.scheduler.running)
        for _ in range(beside):
            if room > 0:
                passes.submit(min(prompt, room), outputs=1)
                room -= min(prompt, room)
        return passes.step()

    on_cuda = engine.settings.device.startswith("cuda")
    stages = getattr(engine.runner, "stages", None)
    return [_profile(name, step, on_cuda, stages) for name, step in (("decode", decode), ("mixed", mixed))]


def _profile(
    name: str, step: Callable[[], RaggedBatch], on_cuda: bool, stages: Callable[[], dict[str, float]] | None
) -> tuple[Profile, Any]:
    times = []
    for _ in range(TIMED):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    _profiled(step, on_cuda)  # the first one has the profiler itself start
    before = stages() if stages else {}
    found, batch = _profiled(step, on_cuda)
    kernels = [Kernel(stage, 1, seconds - before[stage]) for stage, seconds in stages().items()] if stages else []
    kernels = sorted(kernels or _kernels(found, on_cuda), key=lambda kernel: -kernel.seconds)
    busy_s, span_s = _busy(found) if on_cuda else (None, None)
    work, seconds = batch.work, statistics.median(times)
    counts = (work.tokens, work.decode_tokens, work.prompt_tokens, work.sequences, work.kv_read_tokens)
    return Profile(name, *counts, seconds, busy_s, span_s, kernels), found


def _profiled(step: Callable[[], RaggedBatch], on_cuda: bool) -> tuple[Any, RaggedBatch]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        batch = step()
        if on_cuda:
            torch.cuda.synchronize()
    return found, batch


def _kernels(found: Any, on_cuda: bool) -> list[Kernel]:
    """Returns what ran on the device; on a CPU the operators, each without those that it calls."""
    from torch.autograd import DeviceType

    kernels = []
    for one in found.key_averages():
        if on_cuda != (one.device_type == DeviceType.CUDA) or getattr(one, "is_user_annotation", False):
            continue
        took = one.self_device_time_total if on_cuda else one.self_cpu_time_total
        if took > 0:
            kernels.append(Kernel(one.key, one.count, took / MICROSECONDS))
    return kernels


def _busy(found: Any) -> tuple[float, float]:
    """Returns the seconds in which the device ran something, and those from its first begin to its last end."""
    from torch.autograd import DeviceType

    times = sorted(
        (one.time_range.start, one.time_range.end)
        for one in found.events()
        if one.device_type == DeviceType.CUDA and not getattr(one, "is_user_annotation", False)
    )
    if not times:
        return 0.0, 0.0
    busy, until = 0.0, times[0][0]
    for begin, end in times:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / MICROSECONDS, (until - times[0][0]) / MICROSECONDS


def text(profile: Profile, top: int = TOP) -> list[str]:
    """Returns a profile as a table, line by line."""
    launched = sum(kernel.calls for kernel in profile.kernels)
    lines = [
        f"{profile.name} pass: {profile.decodes} decodes and {profile.prompt_tokens} prompt tokens of "
        f"{profile.sequences} sequences, {profile.keys_read:,} keys read; {profile.seconds * 1e3:.2f} ms",
        f"{launched:,} launches, {profile.kernel_s * 1e3:.2f} ms in them" + _idle(profile),
        f"{'ms':>9}  {'share':>6}  {'calls':>6}  what",
    ]
    for kernel in profile.kernels[:top]:
        share = f"{profile.share(kernel):.1%}"
        lines.append(f"{kernel.seconds * 1e3:>9.3f}  {share:>6}  {kernel.calls:>6}  {kernel.name[:100]}")
    return lines


def _idle(profile: Profile) -> str:
    if profile.busy_s is None or not profile.span_s:
        return ""
    return f"; between the first and the last the device was busy {profile.busy_s / profile.span_s:.1%} of the time"


def loaded(overrides: Sequence[str]) -> Any:
    """Returns a FastGen engine, loaded and warm; raises UserError for what is wrong, or not FastGen on one device."""
    catalogue.register()
    job = jobs.prepare(compose(list(overrides)))
    if job.config.engine.name != "fastgen":
        raise UserError("engine", f"{job.config.engine.name}: the passes are fastgen's", "use engine=fastgen")
    if job.ranks > 1:
        raise UserError("parallel", f"{job.ranks} ranks: passes of one are profiled", "use parallel=single")
    rank = Rank()
    setup.use_cores(job, rank)
    engine = catalogue.create(setup.engine_settings(job, rank, None))
    engine.load()
    engine.warm_up()
    return engine


def write(found: Sequence[tuple[Profile, Any]], kernels: str, directory: Path) -> None:
    """Writes the traces and ``profile.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    for profile, trace in found:
        trace.export_chrome_trace(str(directory / f"{profile.name}.json.gz"))
    plain = {"kernels": kernels, "passes": [asdict(profile) for profile, _ in found]}
    (directory / "profile.json").write_text(json.dumps(plain, indent=1))


def main() -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the traces and profile.json")
    parser.add_argument("--decodes", type=positive, metavar="N", help="sequences that decode (as many as fit)")
    parser.add_argument("--context", type=positive, default=400, metavar="N", help="tokens of each (400)")
    parser.add_argument("--prompt", type=positive, default=256, metavar="N", help="tokens of a prompt (256)")
    options, overrides = parser.parse_known_args()
    os.environ[build.STAGES] = "1"
    try:
        engine = loaded(overrides)
        found = profiles(engine, options.decodes, options.context, options.prompt)
    except UserError as error:
        return report(error)
    print("\n\n".join("\n".join(text(profile)) for profile, _ in found))
    if options.out is not None:
        write(found, engine.kernels, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
