"""Whether a run kept its ``power_limit_w``: what its hosts drew together, and the moments above the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEPT, BROKEN, UNKNOWN = "kept", "broken", "unknown"
MOMENTS = 20  # written down one by one; all are counted


def judged(limit_w: float, hosts: Sequence[dict[str, Any] | None], interval_s: float) -> dict[str, Any]:
    """Returns the record's section ``power``.

    Args:
        hosts: of each host what :meth:`harness.machine.power.PowerSeries.summary` says; None for one that said nothing.
        interval_s: seconds from one sample to the next.
    """
    known = [host for host in hosts if host is not None and host["samples"]]
    together = _together([host["samples"] for host in known])
    above = [(time_s, watts) for time_s, watts in together if watts > limit_w]
    why = None
    if len(known) < len(hosts) or not known:
        why = "a host did not say what it drew"
    elif any(host["gaps"] for host in known):
        why = "some samples lack a GPU"
    peak = max(together, key=lambda sample: sample[1], default=None)
    return {
        "limit_w": limit_w,
        # What is known to be too much stays so, whatever else was drawn.
        "verdict": BROKEN if above else KEPT if why is None else UNKNOWN,
        "why": None if above else why,
        "peak_w": None if peak is None else peak[1],
        "peak_at_s": None if peak is None else peak[0],
        "mean_w": sum(watts for _, watts in together) / len(together) if together else None,
        "above": len(above),
        "moments": [list(moment) for moment in above[:MOMENTS]],
        "samples": len(together),
        "interval_s": interval_s,
        "gpus": sum(host["gpus"] for host in known),
        "cpu_packages": sum(host["cpu_packages"] for host in known),
    }


def _together(series: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Returns, at each moment at which a host was looked at, what all were drawing as they were last seen."""
    latest = [samples[0][1] for samples in series]
    moments = sorted((time_s, number, watts) for number, samples in enumerate(series) for time_s, watts in samples)
    found = []
    for time_s, number, watts in moments:
        latest[number] = watts
        found.append((time_s, sum(latest)))
    return found


def of_segments(segments: Sequence[dict[str, Any]], limit_w: float | None) -> dict[str, Any] | None:
    """Returns the section of a resumed run, by its last limit; None where it has none then."""
    if limit_w is None:
        return None
    parts = [segment["power"] for segment in segments if segment.get("power")]
    if not parts:
        return judged(limit_w, [], 0.0)
    highest = max((part for part in parts if part["peak_w"] is not None), key=lambda one: one["peak_w"], default=None)
    found = parts[-1] | {"limit_w": limit_w, "moments": [one for part in parts for one in part["moments"]][:MOMENTS]}
    found |= {name: sum(part[name] for part in parts) for name in ("above", "samples")}
    found["mean_w"] = None  # of segments of any length
    if highest is not None:
        found |= {name: highest[name] for name in ("peak_w", "peak_at_s")}
    broken = highest is not None and highest["peak_w"] > limit_w
    whole = len(parts) == len(segments) and all(part["why"] is None for part in parts)
    why = None if broken or whole else "not all of the run's segments say what was drawn"
    return found | {"verdict": BROKEN if broken else KEPT if whole else UNKNOWN, "why": why}


def sentence(power: dict[str, Any]) -> str:
    """Returns the verdict, for the summary and for ``compare``."""
    limit = f"the limit of {power['limit_w']:,.0f} W"
    if power["verdict"] == UNKNOWN:
        return f"whether {limit} was kept is unknown: {power['why']}"
    parts = [
        f"{count} {name}{'s' * (count > 1)}"
        for count, name in ((power["gpus"], "GPU"), (power["cpu_packages"], "processor package"))
        if count
    ]
    peak = f"{' and '.join(parts)} drew at most {power['peak_w']:,.0f} W, {power['peak_at_s']:,.1f} s into the clock"
    if power["verdict"] == KEPT:
        return f"{limit} was kept: {peak}"
    return f"{limit} was BROKEN in {power['above']:,} of {power['samples']:,} samples: {peak}"
