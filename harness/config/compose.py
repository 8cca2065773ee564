"""Hydra's plumbing: what it must know, and configs composed without its command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError
from harness.basics.places import CONF
from harness.config import engine_schemas
from harness.config.engine_schemas import keys_of, owners
from harness.config.explain import explain, foreign_key, not_one
from harness.config.identity import GROUPS
from harness.config.own import USUAL_RESULTS, results_of
from harness.config.schema import Config, EngineConfig

results_dir = USUAL_RESULTS  # of the command line that is composed: searches have left options there


def look_in_results_of(words: Sequence[str]) -> None:
    """Has Hydra find the experiments that lie in the ``results_dir`` of a command line."""
    global results_dir
    results_dir = results_of(words)


def compose(overrides: list[str]) -> DictConfig:
    """Returns the config that ``harness/main.py`` would compose, once the engines are registered; raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    look_in_results_of(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides, return_hydra_config=True)
        check_choices(composed.hydra.runtime.choices)
        return without_hydra(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error) from error


def register(engines: Mapping[str, type[EngineConfig]]) -> None:
    """Makes known to Hydra what ``conf/`` names: the schema, the engines' own parts of it by name, and our plugins."""
    from hydra.core.config_store import ConfigStore

    plugins = str(Path(__file__).resolve().parents[1] / "running" / "plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)  # Hydra takes plugins from a package hydra_plugins alone, wherever parts of it lie
    ConfigStore.instance().store(name="schema", node=Config)
    engine_schemas.register(engines)


def compose_once() -> None:
    """Has Hydra compose a command line once, not twice: the first time is but to read ``hydra.mode``.

    That is a quarter of a second of every process. Whether there are several jobs is for the flag ``-m`` alone to say.
    """
    from hydra._internal.hydra import Hydra

    Hydra.get_mode = lambda self, config_name, overrides: None  # what Hydra takes for "as the flags say"


def search_path() -> list[str]:
    """Returns the overrides that name further directories of options; who composes the same needs them too."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    return [word for word in HydraConfig.get().overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]


def to_config(composed: DictConfig) -> Config:
    """Returns the composed config as plain typed objects, the engine's part as its own class.

    Raises:
        UserError: a value is missing, or a key is another engine's.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(missing[0], "not set", f"give {missing[0]}=...")
    engine = OmegaConf.get_type(composed, "engine")
    engine = engine if issubclass(engine, EngineConfig) else EngineConfig
    for key, value in composed.engine.items():
        if key != "name" and key not in keys_of(engine) and owners(key):
            raise foreign_key(key, value, composed.engine.name)
    # Merged anew: a key that was added with + is in the composed config, though not in the schema.
    config = OmegaConf.to_object(OmegaConf.merge(_schema(engine), OmegaConf.to_container(composed)))
    assert isinstance(config, Config)
    return config


@cache
def _schema(engine: type[EngineConfig]) -> DictConfig:
    """Returns the schema with an engine's keys, which merging copies: making it was a third of the work."""
    return OmegaConf.structured(Config(engine=engine()))


def check_choices(choices: Mapping[str, object]) -> None:
    """Raises UserError unless one option of each group was chosen: Hydra would merge a list of them into one."""
    for group in GROUPS:
        if not isinstance(choices.get(group), str):
            raise not_one(group)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Returns a config without Hydra's own part, as a job sees it."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
