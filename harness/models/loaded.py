"""Which checkpoint a run loaded, as what and onto what: the record's section ``loaded``, made and checked here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from harness.basics.errors import one_line
from harness.basics.files import plain
from harness.models.fingerprint import fingerprint
from harness.models.source import Source

NAMES = ("model", "weights", "dtype", "device", "device_name", "kernels")
BOTH = ("device", "device_name")  # what the record's environment says too


def identity(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """Returns what a record is to say under ``loaded``, once its own names are known.

    Args:
        record: with :data:`NAMES`, as far as they are known.
        source: what was loaded.

    Raises:
        UserError: a file of the checkpoint cannot be read.
    """
    facts = {"checkpoint_sha256": fingerprint(source), **{name: plain(record.get(name)) for name in NAMES}}
    return facts | {"sha256": _digest(facts)}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoints(record: dict[str, Any]) -> list[str]:
    """Returns the fingerprints of the checkpoints that a run's segments loaded, each once."""
    found = [_loaded(part).get("checkpoint_sha256") for part in _parts(record)]
    return list(dict.fromkeys(str(one) for one in found if one is not None))


def unchecked(record: dict[str, Any]) -> bool:
    """Whether the run, or a segment of it that computed something, has no section ``loaded``."""
    parts = _parts(record)
    return any(not _loaded(part) and (len(parts) == 1 or part.get("kernels")) for part in parts)


def problems(record: dict[str, Any]) -> Iterator[str]:
    """Yields what a record says of its model, type and device that is not what was written down at load."""
    parts = _parts(record)
    for number, part in enumerate(parts, start=1):
        where = f"loaded of segment {number}" if len(parts) > 1 else "loaded"
        loaded = _loaded(part)
        if loaded and loaded.get("sha256") != _digest({key: loaded[key] for key in loaded if key != "sha256"}):
            yield f"record.json, {where}: its sha256 is not that of what it says"
        environment = part.get("environment")
        environment = environment if isinstance(environment, dict) else {}
        for name in BOTH:
            said, found = part.get(name), environment.get(name)
            if None not in (said, found) and said != found:
                yield f"record.json says {name} {_text(said)}, its environment {_text(found)}"
    for name in NAMES:
        expected = _expected(name, parts)
        if expected is not None and record.get(name) != expected:
            yield f"record.json says {name} {_text(record.get(name))}, its section loaded {_text(expected)}"
    if len(found := checkpoints(record)) > 1:
        yield f"its segments loaded {len(found)} checkpoints: sha256 {', '.join(one[:12] for one in found)}"


def _expected(name: str, parts: list[dict[str, Any]]) -> Any:
    """Returns what the record must say of one of :data:`NAMES`; None where nothing was written down at load."""
    if not any(_loaded(part) for part in parts):
        return None
    if name == "device":  # the record has the last segment's
        return _loaded(parts[-1]).get(name)
    # As segments.whole_run() joins them; a segment that ended before its load did has its device's name among them.
    values = [_loaded(part).get(name, part.get(name)) for part in parts]
    return " + ".join(dict.fromkeys(str(value) for value in values if value is not None)) or None


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    segments = record.get("segments")
    parts = [part for part in segments if isinstance(part, dict)] if isinstance(segments, list) else []
    return parts or [record]


def _loaded(part: dict[str, Any]) -> dict[str, Any]:
    loaded = part.get("loaded")
    return loaded if isinstance(loaded, dict) else {}


def _text(value: Any) -> str:
    return one_line(str(value), 60)
