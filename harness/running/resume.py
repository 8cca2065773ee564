"""What ``resume=RUN_ID`` runs: the config of that run, with what the command line changes in it."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError, quoted
from harness.config.identity import GROUPS, PLACES
from harness.engines import catalogue
from harness.ranks.rank import Rank
from harness.results.directory import read_record, run_directory

# What the tokens or the work depend on, beside the engine's own resume_keys; all else (memory, ranks, order) may be
# another the second time.
SAME_GROUPS = ("model", "dataset", "generation")


def compose(typed: DictConfig, overrides: list[str], rank: Rank | None) -> DictConfig:
    """Returns the config with which a run is resumed.

    A command line that sets single keys changes them in the run's own config; one that chooses a group's option or an
    experiment is the whole command line again, and counts as it is.

    Args:
        typed: what the command line composes to by itself.
        overrides: the command line.

    Raises:
        UserError: there is no such run, its config cannot be read, or the command line asks for other work.
    """
    run_id, results_dir = str(typed.resume), str(typed.results_dir)
    repeated = typed.repeat != 1 or typed.repeat_until is not None
    if repeated or typed.sweep.resume or typed.sweep.confirm or typed.sweep.save_as is not None:
        raise UserError("resume", f"{quoted(run_id)} is one run, with repeat=1 and no sweep", "leave those keys out")
    directory = run_directory(results_dir, run_id)
    path = directory / "config.yaml"
    if not path.is_file():
        if rank is not None and rank.host > 0:
            return typed  # rank 0, which keeps the run, compares what the hosts have composed
        found = f"no run {run_id} in {quoted(results_dir, 300)}"
        if directory.is_dir():
            found = f"the config.yaml of {run_id} is missing"
        raise UserError("resume", found, "take a run id from the first column of runs.csv, or set results_dir")
    try:
        recorded = OmegaConf.load(path)
        assert isinstance(recorded, DictConfig)
        before = catalogue.typed(recorded)
        config = before.copy()
        config.repeat, config.repeat_until = typed.repeat, typed.repeat_until
        config.sweep, config.requeue = typed.sweep, typed.requeue
        if rank is not None:  # by itself a run has the ranks that it had; a launch may bring another number
            config.parallel.update(_asked(results_dir, run_id))
        if not _apply(overrides, config, typed):
            config = typed.copy()
    except (OmegaConfBaseException, OSError, ValueError, AssertionError) as error:
        found = f"the config.yaml of {run_id} cannot be used ({type(error).__name__}: {error})"
        raise UserError("resume", found, "start a new run with the command line in its record.json") from error
    config.resume, config.results_dir = run_id, results_dir
    _check_same(before, config, run_id)
    return config


def _asked(results_dir: str, run_id: str) -> dict[str, Any]:
    """Returns what of ``parallel`` the run left to be chosen, as None, so that it is chosen again."""
    record = read_record(results_dir, run_id) or {}
    first = (record.get("segments") or [record])[0]
    asked = (first.get("split") or {}).get("asked") or {}
    return {name: None for name in ("tp", "dp") if name in asked and asked[name] is None}


def _apply(overrides: list[str], config: DictConfig, typed: DictConfig) -> bool:
    """Sets the keys of a command line in ``config``; returns False where it does more than that."""
    parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        if override.key_or_group == "tracking":  # a group that changes nothing of the work
            config.tracking = typed.tracking
            continue
        group = override.key_or_group.partition("/")[0]
        if override.is_delete() or override.package is not None or group in (*GROUPS, "experiment", "hydra"):
            return False
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return True


def _facts(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(data, dict)
    facts = {f"{group}.{key}": value for group in SAME_GROUPS for key, value in data[group].items()}
    name = data["engine"]["name"]
    facts |= {f"engine.{key}": data["engine"].get(key) for key in ("name", *catalogue.of_record(name).resume_keys)}
    return {key: value for key, value in facts.items() if key not in PLACES}


def _check_same(before: DictConfig, config: DictConfig, run_id: str) -> None:
    """Raises UserError if ``config`` is not of the same work as the run's own."""
    theirs, ours = _facts(before), _facts(config)
    for key in sorted({*theirs, *ours}, key=lambda key: (key != "engine.name", key)):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                key,
                f"{quoted(ours.get(key))} here, {quoted(theirs.get(key))} in {run_id}",
                f"give resume={run_id} without it, or start a new run",
            )
