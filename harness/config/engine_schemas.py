"""The engines' own keys, as their rooms have made them known to Hydra; ``conf/engine/NAME.yaml`` names its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from harness.config.schema import EngineConfig

ENDING = "_schema"  # an engine's option begins with: defaults: [/NAME_schema@_here_, _self_]


def register(engines: Mapping[str, type[EngineConfig]]) -> None:
    """Makes the keys of engines known, by name; see ``harness.engines.catalogue.register``."""
    from hydra.core.config_store import ConfigStore

    for name, config in engines.items():
        ConfigStore.instance().store(name=name + ENDING, node=config)


def registered() -> dict[str, type[EngineConfig]]:
    """Returns what was registered."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ending = f"{ENDING}.yaml"  # the store's names are those of files
    stored = {name: found for name, found in ConfigStore.instance().repo.items() if name.endswith(ending)}
    return {name.removesuffix(ending): OmegaConf.get_type(found.node) for name, found in stored.items()}


def keys_of(config: type[EngineConfig]) -> list[str]:
    """Returns an engine's own keys."""
    return [field.name for field in fields(config) if field.name != "name"]


def owners(key: str) -> list[str]:
    """Returns the engines that have a key."""
    return sorted(name for name, config in registered().items() if key in keys_of(config))
