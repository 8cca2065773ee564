"""What is said of a run that was not alone on its machine: from the record's ``telemetry``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOISY = 0.05  # of the CPU time of the run's cores; below that, runs differ by as much on a quiet machine
CORES_NAMED = 4


def notes(record: dict[str, Any]) -> Iterator[str]:
    """Yields what a reader of the figures has to know of CPU time that the run did not get."""
    share = record.get("others_cpu_share")
    hosts = (record.get("telemetry") or {}).get("hosts") or []
    seen = [(host.get("hostname"), host["others_cpu"]) for host in hosts if host.get("others_cpu")]
    if share is not None and share >= NOISY:
        where = "" if record.get("segments") or not seen else _where(*_worst(seen), several=len(hosts) > 1)
        yield (
            f"other processes took {share:.1%} of the CPU time of this run's cores during the clock{where}: "
            f"its figures are not those of a quiet machine"
        )
    for hostname, found in seen:
        held, seconds = found["throttled_s"], (found["seconds"] or 0.0) * len(found["cores"])
        if held and seconds and held >= NOISY * seconds:
            where = f"on {hostname} for {held:,.1f} s of a core"
            yield f"a limit on the CPU time of this container held the run back {where}"


def _worst(seen: list[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Returns the host of which others had most."""
    return max(seen, key=lambda pair: pair[1]["share"] or 0.0)


def _where(hostname: Any, found: dict[str, Any], several: bool) -> str:
    """Returns on which host and cores it was, the worst first, in brackets; empty where that is not known."""
    by_core = {one["core"]: one["others_share"] for one in found["cores"] if one["others_share"] is not None}
    worst = sorted((core for core in by_core if by_core[core] >= NOISY), key=lambda core: -by_core[core])
    parts = [f"on {hostname}"] if several else []
    parts += [f"core {core} {by_core[core]:.0%}" for core in worst[:CORES_NAMED]]
    parts += [f"{len(worst) - CORES_NAMED} more cores"] if len(worst) > CORES_NAMED else []
    if found["others_s"] and (found["stolen_s"] or 0.0) >= found["others_s"] / 2:
        parts.append("most of it stolen by other virtual machines")
    return f" ({', '.join(parts)})" if parts else ""
