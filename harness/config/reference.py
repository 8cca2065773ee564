"""What the schema says of its keys, one by one, for ``--help``, errors and the tables in ``conf/README.md``."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from harness.config.engine_schemas import registered
from harness.config.schema import Config, EngineConfig

TOP = ""  # the section of the keys that are in no group
KINDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key, dotted, and what is said of it; words of the config's own are in backticks."""

    name: str
    unit: str
    allowed: str
    meaning: str


def sections(engine: type[EngineConfig]) -> dict[str, list[Key]]:
    """Returns the keys of a config whose engine has these keys, by group, in the schema's order."""
    found: dict[str, list[Key]] = {}
    for field in dataclasses.fields(Config):
        kind = _hints(Config)[field.name]
        if dataclasses.is_dataclass(kind):
            group = engine if field.name == "engine" else kind
            hints = _hints(group)
            found[field.name] = [
                _key(f"{field.name}.{inner.name}", inner, hints[inner.name]) for inner in dataclasses.fields(group)
            ]
        else:
            found.setdefault(TOP, []).append(_key(field.name, field, kind))
    return found


def every() -> dict[str, Key]:
    """Returns the keys of all groups and of all known engines by name; what two engines share is the first one's."""
    found: dict[str, Key] = {}
    for engine in registered().values():
        for keys in sections(engine).values():
            found = {key.name: key for key in keys} | found
    found.pop("engine.name", None)  # the option is the engine
    return found


def written(value: object) -> str:
    """Returns a value as it stands in a config, on one line."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _key(name: str, field: dataclasses.Field[Any], kind: Any) -> Key:
    said = field.metadata  # empty in an engine from outside that says nothing
    return Key(name, said.get("unit", ""), said.get("allowed") or _choices(kind), said.get("meaning", ""))


def _choices(kind: Any) -> str:
    """Returns what a type allows; that it may be null its default says."""
    if get_origin(kind) in (Union, type(int | None)):
        return ", ".join(filter(None, (_choices(one) for one in get_args(kind) if one is not type(None))))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    return KINDS.get(kind, "")
