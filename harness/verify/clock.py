"""A run's clock against everything else that has a time in it: passes, telemetry, completions, the wall clock."""

from __future__ import annotations

import datetime
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.basics.errors import one_line
from harness.basics.files import numbered_lines
from harness.engines import catalogue, room
from harness.machine.telemetry import INTERVAL_S, SERIES, STOP_S
from harness.results.passes import pass_figures, pass_rows
from harness.verify import drafts, sharing
from harness.verify.runs import RecordedRun

PASSES = "passes.csv"
WALL_S = 2.0  # both ends of a run are whole seconds, and the wall clock may be set meanwhile
SAMPLE_S = 0.5  # a sample may come between the reading of the clock at its end and the order to stop
EXTRA_SAMPLES = 4  # at both ends of a segment, beside one a second


@dataclass(slots=True)
class Passes:
    """The lines of a ``passes.csv``, in order; times in seconds."""

    step: array[float] = field(default_factory=lambda: array("d"))
    started: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    ends: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def of_file(cls, path: Path) -> Passes:
        """Reads a file; lines that are none, as a torn last one, are passed over, and a missing file has none."""
        found = cls()
        for step, started, seconds, tokens in pass_rows(path, "step", "started_s", "seconds", "tokens"):
            found.step.append(step)
            found.started.append(started)
            found.seconds.append(seconds)
            found.ends.append(started + seconds)
            found.tokens.append(tokens)
        return found

    def __len__(self) -> int:
        return len(self.step)

    def slack(self, place: int) -> float:
        """Returns by how much the end of a pass may be off: the file has 9 digits of times and 6 of durations."""
        return 1e-6 + 1e-8 * abs(self.started[place]) + 1e-5 * abs(self.seconds[place])


def check(run: RecordedRun, completed: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Returns what of a finished run's times and passes cannot be, and what could not be checked.

    Args:
        completed: the lines of the requests that were not rejected.
    """
    elapsed = number(run.record.get("elapsed_s"))
    if elapsed is None:
        return [], []
    passes = Passes.of_file(run.directory / PASSES)
    simulated = bool(run.record.get("simulated"))  # by a clock that passes alone move
    found = [*([] if simulated else _wall(run.record)), *_telemetry(run, elapsed), *_time(run, elapsed)]
    notes = []
    if error := run.record.get("passes_error"):
        notes.append(f"{PASSES} is not whole ({one_line(str(error), 100)}): what is missing was not checked")
    if not len(passes):
        if completed:
            notes.append(f"no {PASSES} in {run.run_id}: its clock was not compared with its passes")
    else:
        found += _order(passes, elapsed)
        said, figures = run.record.get("passes"), pass_figures(run.directory / PASSES)
        if isinstance(said, dict) and figures is not None and any(said.get(key) != figures[key] for key in figures):
            found.append(f"record.json's passes are not those of {PASSES}")
        if run.ok:
            found += _last(passes, completed, _statistic(run, "dropped_tokens") > 0)
            if _alone(run) and not run.record.get("passes_error"):
                found += _sums(run, passes, completed)
    if not simulated and run.record.get("telemetry") and not (run.directory / SERIES).is_file():
        notes.append(f"no {SERIES} in {run.run_id}: its clock was not compared with the samples")
    return found, notes


def number(value: Any) -> float | None:
    """Returns a value of a record or a cell as a number; None where it is none."""
    try:
        return None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        return None


def _alone(run: RecordedRun) -> bool:
    """Whether ``passes.csv`` has all passes of the run: one replica, never resumed."""
    return run.record.get("dp") == 1 and not run.record.get("segments")


def _wall(record: dict[str, Any]) -> Iterator[str]:
    """Yields the segments that took longer by their own clock than by the wall's."""
    segments = record.get("segments")
    parts = [part for part in segments if isinstance(part, dict)] if isinstance(segments, list) else []
    for part in parts or [record]:
        ends = part.get("started_at"), part.get("ended_at" if parts else "finished_at")
        took = [number(part.get(name)) or 0.0 for name in ("load_s", "warmup_s", "elapsed_s")]
        if ends[1] is None or part.get("elapsed_is_estimated"):
            continue
        try:
            begun, ended = (datetime.datetime.fromisoformat(str(end)) for end in ends)
            between = (ended - begun).total_seconds()
        except (ValueError, TypeError):
            yield f"record.json says that it ran from {one_line(str(ends[0]), 40)} to {one_line(str(ends[1]), 40)}"
            continue
        if sum(took) > between + WALL_S:
            parts_s = f"load_s {took[0]:.1f} + warmup_s {took[1]:.1f} + elapsed_s {took[2]:.1f}"
            yield f"record.json says {parts_s}, but it ran for {between:.0f} s, from {ends[0]} to {ends[1]}"


def _telemetry(run: RecordedRun, elapsed: float) -> Iterator[str]:
    """Yields samples that were taken after the clock's end, and more of them than its seconds."""
    times = array("d")
    try:
        for place, line in numbered_lines(run.directory / SERIES):
            time_s = number(line.split(b",")[0]) if place > 1 and line.endswith(b"\n") else None
            if time_s is not None:
                times.append(time_s)
    except OSError:
        return
    # The last sample is taken when the clock has stopped; with other ranks, when they have all said so.
    lone = len(times) > 1 and run.record.get("tp") == run.record.get("dp") == 1
    late = [*([(-1, STOP_S)] if times else []), *([(-2, SAMPLE_S)] if lone else [])]
    for place, slack in late:
        if times[place] > elapsed + slack:
            yield f"{SERIES} has a sample at {times[place]:.3f} s, elapsed_s is {elapsed:.3f}"
            return
    segments = run.record.get("segments")
    most = EXTRA_SAMPLES * max(len(segments) if isinstance(segments, list) else 0, 1) + elapsed / INTERVAL_S
    if len(times) > most:
        yield f"{SERIES} has {len(times)} samples, {INTERVAL_S:g} s apart: more than elapsed_s {elapsed:.3f}"


def _time(run: RecordedRun, elapsed: float) -> Iterator[str]:
    """Yields where the parts of the clock's time are not the clock's."""
    times = run.record.get("time")
    if not isinstance(times, dict) or not times:
        return
    parts = {name: number(value) for name, value in times.items()}
    known = [value for value in parts.values() if value is not None]
    if len(known) < len(parts) or abs(sum(known) - elapsed) > 1e-6 * elapsed + 1e-6:
        yield f"the parts of record.json's time add up to {sum(known):.6f} s, elapsed_s is {elapsed:.6f}"
    elif run.record.get("dp") == 1 and min(known) < -1e-3:
        name = min(parts, key=lambda name: parts[name] or 0.0)
        yield f"record.json's time.{one_line(name, 20)} is {parts[name]:.6f} s"


def _order(passes: Passes, elapsed: float) -> Iterator[str]:
    """Yields the first pass that does not fit: one begins when that before it has ended, all end within the clock."""
    total = sum(passes.seconds)
    if total > elapsed + 1e-5 * total:
        yield f"the passes of {PASSES} took {total:.6f} s, elapsed_s is {elapsed:.6f}"
    for place in range(len(passes)):
        begins, slack = passes.started[place], passes.slack(place)
        before = passes.ends[place - 1] - passes.slack(place - 1) if place else 0.0
        if not (passes.seconds[place] >= 0 and begins + slack >= before):
            yield f"{PASSES}, step {passes.step[place]:g}: begins at {begins:.6f} s, the one before ends later"
            return
        if not passes.ends[place] <= elapsed + slack:
            yield f"{PASSES}, step {passes.step[place]:g}: ends at {passes.ends[place]:.6f} s of {elapsed:.6f}"
            return


def _last(passes: Passes, completed: list[dict[str, Any]], dropped: bool) -> Iterator[str]:
    """Yields whether the last pass ends after the request that it must have completed.

    Where tokens were ``dropped``, the last pass may have held nothing else, and that before it completed the request.
    """
    finished = [time for line in completed if (time := number(line.get("finished_s"))) is not None]
    last = len(passes) - 1 - (dropped and len(passes) > 1)
    if finished and max(finished) < passes.ends[last] - passes.slack(last):
        yield f"the last request finished at {max(finished):.6f} s, the last pass at {passes.ends[last]:.6f}"


def _statistic(run: RecordedRun, name: str) -> int:
    """Returns a count of the record's ``engine_statistics``; 0 where it is not there."""
    statistics = run.record.get("engine_statistics")
    value = statistics.get(name) if isinstance(statistics, dict) else None
    return max(value, 0) if isinstance(value, int) else 0


def _sums(run: RecordedRun, passes: Passes, completed: list[dict[str, Any]]) -> Iterator[str]:
    """Yields where the passes of one replica are not those that its requests need."""
    kind = catalogue.of_record(run.record.get("engine")).passes
    if kind is None or not isinstance(run.record.get("engine_statistics"), dict):
        return
    prompt_tokens = sum(line["prompt_tokens"] for line in completed)
    needed = prompt_tokens + sum(len(line["token_ids"]) for line in completed)
    if kind is room.Passes.steps:  # a request's last token is fed back only where its end was not known in time
        needed += _statistic(run, "recomputed_tokens") + _statistic(run, "dropped_tokens") - len(completed)
        needed += drafts.wasted(run.record) - sum(sharing.tokens_of(line) for line in completed)
        yield from drafts.check_passes(run, run.directory / PASSES)
    if sum(passes.tokens) != needed:
        yield f"the passes of {PASSES} have {sum(passes.tokens):.0f} tokens, the completions need {needed}"
    if str(len(passes)) != str(run.record.get("steps")) or list(passes.step) != [*range(1, len(passes) + 1)]:
        yield f"{PASSES} has {len(passes)} steps, record.json says {one_line(str(run.record.get('steps')), 20)}"
    times, total = run.record.get("time"), sum(passes.seconds)
    forward = [number(times.get(name)) for name in ("prefill_s", "decode_s")] if isinstance(times, dict) else [None]
    known = [value for value in forward if value is not None]
    if len(known) < len(forward) or abs(sum(known) - total) > 1e-5 * total + 1e-6:
        yield f"record.json's time has {sum(known):.6f} s of forward passes, those of {PASSES} took {total:.6f}"
    if kind is room.Passes.steps:
        yield from _too_early(passes, completed, drafts.most_a_pass(run))


def _too_early(passes: Passes, completed: list[dict[str, Any]], most: int) -> Iterator[str]:
    """Yields the first request that finished before as many passes had ended as its tokens need.

    Args:
        most: tokens that a pass gives a request, but for its first, which comes alone.
    """
    for line in completed:
        finished = number(line.get("finished_s"))
        if finished is None:
            continue
        ended = bisect_right(passes.ends, finished + 1e-6 + 1e-7 * abs(finished))
        if ended < len(passes) and passes.ends[ended] - passes.slack(ended) <= finished:
            ended += 1
        if 1 + most * (ended - 1) < len(line["token_ids"]):
            tokens = len(line["token_ids"])
            yield f"request {line['index']} finished at {finished:.6f} s with {tokens} tokens, after {ended} passes"
            return
