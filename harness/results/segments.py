"""A run that was resumed: the segments between its starts and ends, on one clock that stands still in between.

The clock of a segment begins where that of the one before it ended, so that the times in ``completions.jsonl`` and
``passes.csv``, and ``elapsed_s``, are of the sum of all segments. A segment that could not stop its clock (kill -9)
ends when its rank 0 was seen to be dead (``lifeline.py``), however long it had been stopped before that. Where nobody
saw it (all processes killed at once, no power), the last sign of life is a lower bound, and marked as one; on the same
boot of the host there is an upper bound too, the moment at which somebody resumes the run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import operator
from pathlib import Path
from typing import Any

from harness.basics.clock import utc_now
from harness.basics.files import numbered_lines
from harness.config.identity import UNHASHED_KEYS, flat
from harness.results import lifeline, power_limit
from harness.results.columns import Combine, combined_over_segments

TAIL_BYTES = 1 << 16
AT_LEAST, ABOUT = "at least ", "about "
SUMS = combined_over_segments(Combine.SUM)
PEAKS = combined_over_segments(Combine.HIGHEST)
MEANS = combined_over_segments(Combine.MEAN)
HASHES = (*combined_over_segments(Combine.HASHED), "job_hash")
# What all segments must have in common, once it is known.
WORK = combined_over_segments(Combine.SAME)
# What the run keeps from its first segment on.
LASTING = (*combined_over_segments(Combine.FIRST), "command_line")
# What the run has several of, if its segments did not agree.
JOINED = combined_over_segments(Combine.JOINED)
COMMIT = "git_commit"  # which a segment has in its environment
# What a segment keeps of the record that it had to itself.
KEPT = (
    *combined_over_segments(Combine.EACH),
    *(*SUMS, *PEAKS, *MEANS, *HASHES, *(name for name in JOINED if name != COMMIT)),
    *("time", "config", "environment", "hostname", "loaded", "proof"),
    *("notes", "engine_statistics", "telemetry", "split", "sizes", "hardware_measured", "hardware_known"),
    *("devices", "power"),
)


def begin(
    earlier: dict[str, Any], directory: Path, completed: int, figures: dict[str, Any], command_line: list[str]
) -> dict[str, Any]:
    """Returns the record of a run that is resumed.

    Args:
        earlier: the record as it was left; ``running`` when nobody could say how the run ended.
        directory: the run's.
        completed: requests that are done, rejected ones among them.
        figures: what the new segment starts with.
        command_line: of the new segment; the record keeps the first one.
    """
    earlier = dict(earlier)
    if "segment" in earlier or not earlier.get("segments"):
        if earlier["status"] == "running":
            earlier |= {"status": "failed", "error": "ended without an error message"}
        end(earlier, directory, completed)
    past = earlier["segments"]
    # Before a rank has looked at the checkpoint, the record has what the config says, which may be another model's.
    known = any(part.get("job_hash") for part in past)
    return {
        **{name: earlier[name] for name in LASTING if name in earlier},
        "status": "running",
        **figures,
        "segments": past,
        "segment": {
            "started_at": utc_now(),
            "command_line": command_line,
            "clock_from_s": past[-1]["clock_to_s"],
            "completed_before": completed,
            "changed": changed(past[-1].get("config", {}), figures["config"]),
        },
        "work": {name: earlier[name] for name in WORK if known and earlier.get(name) is not None}
        | earlier.get("work", {}),
    }


def end(record: dict[str, Any], directory: Path, completed: int) -> None:
    """Moves what is known of the current segment to the record's ``segments``.

    Args:
        record: with its ``status`` and ``error``; a stopped clock is its ``elapsed_s`` or ``clock_s``.
        completed: requests that are done, those of earlier segments among them.
    """
    first = {"started_at": record.get("started_at"), "command_line": record.get("command_line")}
    segment: dict[str, Any] = record.pop("segment", None) or first | {"clock_from_s": 0.0, "completed_before": 0}
    since = segment["clock_from_s"]
    until = record.get("elapsed_s")
    if until is None:
        until = record.get("clock_s")
    estimated, at_most = False, None
    if until is None:
        until, estimated, at_most = _end_of_its_own(record, directory, since)
    before = segment["completed_before"]
    record.setdefault("segments", []).append(
        segment
        | {
            "ended_at": record.get("finished_at"),
            "clock_to_s": until,
            "elapsed_s": until - since,
            "elapsed_is_estimated": estimated,
            **({"elapsed_at_most_s": None if at_most is None else at_most - since} if estimated else {}),
            "completed": completed - before,
            **{name: record[name] for name in KEPT if record.get(name) is not None},
        }
    )


def _end_of_its_own(record: dict[str, Any], directory: Path, since: float) -> tuple[float, bool, float | None]:
    """Returns when a segment ended that did not stop its clock; whether that is a lower bound; and the upper one."""
    least = max(since, last_sign_of_life(directory) or since)
    if record.get("simulated"):
        return least, False, None  # a clock that moves with the passes alone stood still from then on
    life = lifeline.read(directory)
    if life is None or life.segment != len(record.get("segments", [])):
        # It notes the clock's start if it can; an earlier version of ours could not.
        return least, least > since or record.get("clock_boot") is None, None
    least = max(least, life.until_s)
    if life.gone:
        return least, False, None
    at_most = lifeline.host_s() - life.zero_s if life.boot is not None and life.boot == lifeline.boot() else None
    return least, True, at_most if at_most is None else max(at_most, least)


def whole_run(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of all segments together; what one of them lacks is unknown of the whole."""
    segments = record["segments"]
    figures: dict[str, Any] = {}
    for name in SUMS:
        values = [segment.get(name) for segment in segments]
        figures[name] = None if None in values else sum(values)
    for name in PEAKS:
        figures[name] = max((segment[name] for segment in segments if segment.get(name) is not None), default=None)
    timed = [segment for segment in segments if segment.get("elapsed_s")]  # some end before their clock starts
    for name in MEANS:
        values, seconds = ([segment.get(key) for segment in timed] for key in (name, "elapsed_s"))
        known = timed and None not in values
        figures[name] = sum(map(operator.mul, values, seconds)) / sum(seconds) if known else None
    for name in HASHES:
        hashes = sorted({str(segment.get(name)) for segment in segments})
        figures[name] = hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:12]
    times = [segment.get("time") for segment in segments]
    whole: dict[str, float] = {}
    if None not in times:
        for time in times:
            whole |= {name: whole.get(name, 0.0) + seconds for name, seconds in time.items()}
    figures["time"] = whole
    for name in JOINED:
        if len(values := _distinct(segments, name)) > 1:
            figures[name] = " + ".join(values)
    figures["power"] = power_limit.of_segments(timed, (record.get("config") or {}).get("power_limit_w"))
    figures["elapsed_is_estimated"] = any(segment.get("elapsed_is_estimated") for segment in segments)
    devices = {json.dumps(_devices(segment), sort_keys=True) for segment in segments if segment.get("device_name")}
    cores = {json.dumps(found["machine"]) for each in segments if (found := each.get("hardware_measured"))}
    if len(devices) > 1 or len(cores) > 1:
        figures["model_flops_utilisation"] = None  # of which peak?
    return figures


def _distinct(segments: list[dict[str, Any]], name: str) -> list[str]:
    """Returns the values of one of :data:`JOINED` in the order of the segments, each once."""
    if name == COMMIT:
        found = [((segment.get("environment") or {}).get("git") or {}).get("commit") for segment in segments]
    else:
        found = [segment.get(name) for segment in segments]
    return list(dict.fromkeys(str(value) for value in found if value is not None))


def _devices(segment: dict[str, Any]) -> list[Any]:
    """Returns what the peak of a segment's devices depends on."""
    return [*(segment.get(name) for name in ("tp", "dp", "device_name")), (segment.get("config") or {}).get("hardware")]


def note(record: dict[str, Any]) -> str:
    """Returns in a sentence what a reader of the headline has to know."""
    past = record["segments"]
    parts = [f"{_accuracy(each)}{each['elapsed_s']:,.1f} s" for each in past]
    changes = [f"{key}={now} (was {before})" for each in past for key, (before, now) in each.get("changed", {}).items()]
    changes += [f"{name} {' + '.join(values)}" for name in JOINED if len(values := _distinct(past, name)) > 1]
    text = f"resumed; the clock is the sum of {len(past)} segments, {' + '.join(parts)}"
    accuracies = {_accuracy(each) for each in past}
    if ABOUT in accuracies:
        text += "; nobody saw one of them end: elapsed_s may be too low, and the rates too high"
    elif AT_LEAST in accuracies:
        most = [each["elapsed_at_most_s"] if _accuracy(each) else each["elapsed_s"] for each in past]
        bound = "" if None in most else f" and at most {sum(most):,.1f} s"
        least = sum(each["elapsed_s"] for each in past)
        text += f"; nobody saw one of them end: elapsed_s is at least {least:,.1f} s{bound}, the rates are upper bounds"
    return text + (f"; with {', '.join(changes)}" if changes else "")


def _accuracy(segment: dict[str, Any]) -> str:
    """Returns what stands before a segment's time; an estimate of an earlier version of ours is no bound."""
    if not segment["elapsed_is_estimated"]:
        return ""
    return AT_LEAST if "elapsed_at_most_s" in segment else ABOUT


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns, by key, the settings that are not what they were, with both values."""
    was, is_ = (flat(_groups(config), depth=2) for config in (before, now))
    # Records once had the keys of all engines: one that is gone is no change.
    known = {key for key in {*was, *is_} if not key.startswith("engine.") or (key in was and key in is_)}
    return {key: [was.get(key), is_.get(key)] for key in sorted(known) if was.get(key) != is_.get(key)}


def _groups(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {group: keys for group, keys in config.items() if group not in UNHASHED_KEYS}
    return {group: keys for group, keys in groups.items() if isinstance(keys, dict) and keys}


def last_sign_of_life(directory: Path) -> float | None:
    """Returns the latest second of the run's clock that its files tell of; None when it had not started."""
    signs = [0.0]
    for _, line in numbered_lines(directory / "completions.jsonl"):
        try:
            signs.append(float(json.loads(line)["finished_s"]))
        except (ValueError, KeyError, TypeError):
            continue
    for name, columns in (("passes.csv", ("started_s", "seconds")), ("telemetry.csv", ("time_s",))):
        signs += last_rows(directory / name, columns)
    return max(signs) or None


def last_rows(path: Path, columns: tuple[str, ...]) -> list[float]:
    """Returns the sum of ``columns`` in each of a table's last lines, torn ones left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        header = next(csv.reader([file.readline().decode(errors="replace")]), [])
        file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").split("\n")[1:-1]
    found = []
    for cells in csv.reader(lines):
        row = dict(zip(header, cells, strict=False))
        try:
            found.append(sum(float(row[column]) for column in columns))
        except (KeyError, ValueError):
            continue
    return found
