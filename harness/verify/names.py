"""What a run says that it was asked for and that it ran: its record against ``config.yaml`` and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.basics.errors import one_line
from harness.basics.files import plain
from harness.config.identity import config_hash, flat
from harness.models import loaded
from harness.results import segments
from harness.results.columns import columns_from_config
from harness.verify.runs import RecordedRun

CONFIG = "config.yaml"


def check(run: RecordedRun) -> tuple[list[str], list[str]]:
    """Returns what of a finished run's config and names does not fit, and what could not be checked."""
    record, config = run.record, run.record.get("config")
    found: list[str] = []
    notes: list[str] = []
    if not isinstance(config, dict):
        return ["record.json has no config"], []
    if not (run.directory / CONFIG).is_file():
        notes.append(f"no {CONFIG} in {run.run_id}: the config in its record was not compared with it")
    else:
        found += _config(run, config)
    found += _hashes(record, config)
    for name, value in columns_from_config(config).items():
        # The model's own name comes from its files, and "auto" settled, when the run begins.
        if name != "model" and not (name == "dtype" and value is None) and record.get(name) != value:
            found.append(f"record.json says {name} {_text(record.get(name))}, its config {_text(value)}")
    found += loaded.problems(record)
    if loaded.unchecked(record):
        what = "model, type, device and kernels were not checked"
        notes.append(f"{run.run_id} was recorded before runs wrote down what they had loaded: its {what}")
    return found, notes


def _config(run: RecordedRun, config: dict[str, Any]) -> Iterator[str]:
    """Yields the first setting that the record and ``config.yaml`` do not agree on."""
    try:
        asked = plain(OmegaConf.to_container(OmegaConf.load(run.directory / CONFIG), resolve=True))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        yield f"{CONFIG} is damaged: {one_line(str(error), 100)}"
        return
    if not isinstance(asked, dict):
        yield f"{CONFIG} is damaged: it has no keys"
        return
    mine, others = flat(plain(config)), flat(asked)
    for key in sorted({*mine, *others}):
        if key not in mine or key not in others or mine[key] != others[key]:
            said, found = _text(mine.get(key, "nothing")), _text(others.get(key, "nothing"))
            yield f"record.json says {key}={said} in its config, {CONFIG} {found}"
            return


def _hashes(record: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Yields a ``config_hash`` that is not that of the config beside it."""
    parts = record.get("segments")
    if not isinstance(parts, list) or not parts:
        if record.get("config_hash") != (found := config_hash(config)):
            yield f"record.json says config_hash {_text(record.get('config_hash'))}, its config has {found}"
        return
    for number, part in enumerate(parts, start=1):
        asked = part.get("config") if isinstance(part, dict) else None
        if not isinstance(asked, dict) or part.get("config_hash") != config_hash(asked):
            yield f"record.json, segment {number}: its config_hash is not that of its config"
            return
    if parts[-1]["config"] != config:
        yield "record.json's config is not that of its last segment"
    try:
        expected = segments.whole_run(record)["config_hash"]
    except (KeyError, TypeError, AttributeError, ValueError):
        yield "record.json's segments are not as a resumed run writes them"
        return
    if record.get("config_hash") != expected:
        yield f"record.json says config_hash {_text(record.get('config_hash'))}, its segments together {expected}"


def _text(value: Any) -> str:
    return one_line(str(value), 60)
