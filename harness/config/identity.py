"""Which runs are of the same config: groups, the hash of what counts, and settings by their whole keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from harness.basics.files import plain

PLACES = ("model.path", "model.tokenizer", "dataset.path")  # hosts may keep the same files in different places
GROUPS = ("engine", "model", "dataset", "generation", "parallel", "hardware", "tracking")
# Keys that change where and how often a job runs, not what it computes.
UNHASHED_KEYS = (
    *("results_dir", "resume", "requeue", "tracking", "sweep", "repeat", "repeat_until"),
    *("timeout_s", "verify", "export", "preflight", "power_limit_w"),
)


def config_hash(config: dict[str, Any]) -> str:
    """Returns 12 hex digits that are equal for equal jobs, wherever and however often they run."""
    job = {key: value for key, value in config.items() if key not in UNHASHED_KEYS}
    if isinstance(hardware := job.get("hardware"), dict):
        job["hardware"] = {key: value for key, value in hardware.items() if key != "price_per_hour"}
    canonical = json.dumps(plain(job), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flat(config: dict[Any, Any], depth: int | None = None) -> dict[str, Any]:
    """Returns a nested config's values by their keys, joined by dots; an empty section is a value.

    Args:
        depth: how many levels of keys there may be; what lies deeper is one value. None for all.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value and depth != 1:
            inner = flat(value, None if depth is None else depth - 1)
            found |= {f"{key}.{name}": inner[name] for name in inner}
        else:
            found[str(key)] = value
    return found
