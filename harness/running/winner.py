"""What is done with the best settings that a search has found: a command line, and an experiment of their own."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.basics import files
from harness.basics.errors import UserError, printable
from harness.basics.places import RUN
from harness.config import compose
from harness.config.own import own_option, tuned_options
from harness.config.schema import Config
from harness.engines import catalogue as engines
from harness.machine.device import accelerator, device_name
from harness.models import locate
from harness.running.sweep import Sweep
from harness.running.sweep_table import SweepJob, choices
from harness.workload import catalogue

MARK = "# Found by a search on "  # in the first lines of what is written there
# Of the search alone: what it finds is not to be run on few requests.
SEARCH_KEYS = ("dataset.num_samples", "repeat", "repeat_until", "timeout_s")


def may_replace(path: Path) -> bool:
    """Returns whether there is nothing at ``path`` but what a search has written."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def announce(sweep: Sweep, composed: DictConfig, winner: SweepJob, varied: Sequence[str], figures: str) -> None:
    """Prints the winning command line, and writes its values as an experiment.

    Args:
        composed: the config of the search.
        varied: the overrides that the search chose.
        figures: how fast it is, in words.

    Raises:
        UserError: the experiment cannot be written.
    """
    assert sweep.compose is not None
    chosen = sweep.compose(winner.overrides)
    found = {key: files.plain(OmegaConf.select(chosen, key)) for key in choices(varied)}
    others = without_search(winner.overrides, found, catalogue.find(composed.dataset.name).makes_requests)
    command = [*RUN, *others]
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    line = shlex.join([*command, *(f"{key}={value}" for key, value in values.items())])
    sweep.say(f"\nwinner: {figures}\n    {line}")
    settings = compose.to_config(composed)
    path = place(settings)
    overlay = OmegaConf.create()
    for key, value in found.items():
        OmegaConf.update(overlay, key, value)
    lines = [
        "# @package _global_",
        f"{MARK}{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, for {printable(checkpoint(settings))} and "
        f"{printable(composed.dataset.name)} on {printable(machine(settings))}:",
        f"# {figures}; run {winner.runs[-1].run_id}",
        OmegaConf.to_yaml(overlay),
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, "\n".join(lines).encode())
    except (OSError, UserError) as error:
        raise UserError("sweep.save_as", f"{path} cannot be written", "use the command line above") from error
    beside = [word.partition("=")[2].strip("[]") for word in others if word.startswith("experiment=")]
    names = ",".join([*beside, path.stem])
    plain_words = [word for word in command if not word.startswith("experiment=")]
    shown = shlex.join([*plain_words, f"experiment={f'[{names}]' if beside else names}"])
    sweep.say(f"written to {os.path.relpath(path)}:\n    {shown}")


def place(settings: Config) -> Path:
    """Returns the file of the experiment: ``sweep.save_as`` among the options, else one by its name in the results."""
    if settings.sweep.save_as is not None:
        return own_option("experiment", settings.sweep.save_as)
    parts = (re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-") for part in (checkpoint(settings), machine(settings)))
    name = "_".join(["tuned", *filter(None, parts)])[:100]
    return tuned_options(settings.results_dir) / "experiment" / f"{name}.yaml"


def checkpoint(settings: Config) -> str:
    """Returns what the model is called by where it lies: its directory, GGUF file or hub id; else by its option."""
    simulates = engines.find(settings.engine.name).simulates
    source = locate.described(settings.model) if simulates else locate.locate(settings.model)
    if settings.model.path is None or source.path is None:
        return locate.model_name(settings.model, source)
    return source.gguf_file.removesuffix(".gguf") if source.gguf_file else Path(source.path).resolve().name


def machine(settings: Config) -> str:
    """Returns the name of the device that was searched on, or for."""
    if engines.find(settings.engine.name).simulates:
        return f"{settings.hardware.name} (simulated)"
    return device_name(accelerator())


def without_search(overrides: Sequence[str], found: dict[str, Any], makes_requests: bool) -> list[str]:
    """Returns the overrides that a plain run keeps: not what was searched, nor what only the search needs."""
    dropped = {*found, *SEARCH_KEYS}
    if makes_requests:  # without a file there is no other number of them
        dropped.discard("dataset.num_samples")
    kept: dict[str, str] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "experiment":
            names = [name for name in value.strip("[]").split(",") if name != "tune"]
            if names:
                kept[key] = f"experiment=[{','.join(names)}]"
        elif key.lstrip("+") not in dropped and not key.startswith(("sweep.", "hydra")):
            kept[key] = word
    return list(kept.values())
