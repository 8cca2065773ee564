"""The engines there are, found rather than listed; cheap to import.

A folder beside this file with a ``room.py`` is an engine, and so is what an installed package declares as an entry
point of the group ``harness.engines`` (``NAME = package.room:ROOM``). A room is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.basics.errors import UserError, one_line, quoted
from harness.config import compose
from harness.config.checks import check_kv_heads
from harness.config.schema import Config, DType
from harness.engines.base import Engine, EngineSettings
from harness.engines.room import Room

GROUP = "harness.engines"


@cache
def _places() -> dict[str, str]:
    """Returns, by engine, where its declaration is, as ``module:ROOM``."""
    inside = sorted(path.parent.name for path in Path(__file__).parent.glob("*/room.py"))
    found = {name: f"{__package__}.{name}.room:ROOM" for name in inside}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise UserError(f"engine {entry.name}", f"{entry.value} is a second one of that name", "uninstall one")
    return dict(sorted(found.items()))


def names() -> tuple[str, ...]:
    """Returns the names of all engines."""
    return tuple(_places())


@cache
def find(name: str) -> Room:
    """Returns an engine's room; raises UserError for a name that is none, or a room that cannot be imported."""
    if name not in _places():
        raise UserError("engine.name", quoted(name), f"choose one of {', '.join(names())}")
    try:
        room = _imported(_places()[name])
    except Exception as error:  # somebody else's code
        found = f"{_places()[name]} cannot be imported ({one_line(f'{type(error).__name__}: {error}', 200)})"
        raise UserError(f"engine {name}", found, "mend its package, or uninstall it") from error
    if not isinstance(room, Room) or room.name != name:
        raise UserError(f"engine {name}", f"{_places()[name]} is no room of that name", "mend its package")
    return room


def of_record(name: object) -> Room:
    """Returns the room of an engine that a record names; where it is not known here, one of no particulars."""
    return find(name) if isinstance(name, str) and name in _places() else Room()


def register() -> None:
    """Makes the schema and each engine's own part of it known to Hydra."""
    compose.register({name: find(name).config for name in names()})


def check(config: Config, accelerator: str) -> None:
    """Refuses what the engine cannot do, before anything heavy is imported.

    Args:
        accelerator: ``cpu`` or ``cuda``, what the ranks will run on.

    Raises:
        UserError: naming the field, its value and the way out.
    """
    room = find(config.engine.name)
    if not isinstance(config.engine, room.config):
        raise UserError("engine.name", f"{room.name}, with the keys of another engine", f"use engine={room.name}")
    room.check(config, accelerator)
    if accelerator == "cpu" and config.model.dtype is DType.float16:
        raise UserError(
            "model.dtype",
            "float16 is not computed well on cpu",
            "use model.dtype=bfloat16, float32 or auto",
        )
    kv_heads = config.model.architecture.get("num_key_value_heads") if config.model.path is None else None
    check_kv_heads(config.parallel.tp or 1, kv_heads)


def create(settings: EngineSettings[Any]) -> Engine[Any]:
    """Returns the engine that ``settings.engine.name`` names, nothing loaded yet."""
    engine: Engine[Any] = _imported(find(settings.engine.name).engine)(settings)
    return engine


def typed(recorded: DictConfig) -> DictConfig:
    """Returns the config of a record with its types.

    Until each engine had its own keys, a record had those of all of them: what the engine does not have is left out.

    Raises:
        UserError: the engine is not known here.
        OmegaConfBaseException: a value is not of its type.
        ValueError: it has no engine.
    """
    engine = recorded.get("engine")
    if not isinstance(engine, DictConfig):
        raise ValueError("it has no engine")
    room = find(str(engine.get("name")))
    mine = OmegaConf.masked_copy(recorded, [key for key in recorded if key != "engine"])
    mine.engine = OmegaConf.masked_copy(engine, [key for key in engine if key in ("name", *room.keys)])
    merged = OmegaConf.merge(OmegaConf.structured(Config(engine=room.config())), mine)
    assert isinstance(merged, DictConfig)
    return merged


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
