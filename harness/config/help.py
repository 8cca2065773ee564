"""``--help``: the groups with their options, and every key of the config as composed, from the schema."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.basics.places import LAUNCHED, RUN
from harness.config.compose import check_choices, to_config, without_hydra
from harness.config.identity import GROUPS
from harness.config.reference import TOP, Key, sections, written

WIDTH = 80
BEGINNING = """\
Runs a list of prompts through a Llama model as fast as this machine can, and
records a number you can trust.
"""
EXAMPLES = {
    "": "the demo model",
    "model.path=DIR dataset=asc24 dataset.path=FILE": "",
    "-m engine.token_budget=128,256": "a sweep",
    "-m experiment=tune": "a search",
    "--help engine=ds_inference": "the keys it has",
    "parallel.tp=2 parallel.dp=4": "8 ranks",
}
UNDER_DEEPSPEED = {f"deepspeed --num_gpus 8 {LAUNCHED}": "a launch by hand"}
ENDING = """\
--cfg job prints the config and runs nothing; -m runs a sweep over values with
commas; --version; -sc install=bash completes keys in a shell; --hydra-help has
Hydra's other flags.

A run leaves results/<run_id>/ (record.json, config.yaml, completions.jsonl,
passes.csv, telemetry.csv, run.log) and one row in results/runs.csv, which
python -m harness.compare compares. Exit status: 0 all done, 1 failed,
2 something to put right, 130 interrupted. conf/README.md says more of each key.
"""


def answer() -> None:
    """Has Hydra's ``--help`` print this: its own template knows a config, but not what the schema says of its keys."""
    from hydra._internal.hydra import Hydra

    Hydra.app_help = _print


def _print(hydra: Any, config_name: str, args_parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from hydra.core.object_type import ObjectType
    from hydra.types import RunMode

    whole = hydra.compose_config(config_name, args.overrides, RunMode.RUN, with_log_configuration=False)
    choices = whole.hydra.runtime.choices
    check_choices(choices)

    def options(group: str, kind: ObjectType) -> list[str]:
        found = hydra.config_loader.get_group_options(group, kind, config_name, args.overrides)
        assert isinstance(found, list)
        return found

    groups = [group for group in options("", ObjectType.GROUP) if group != "hydra"]
    print(text(without_hydra(whole), {group: options(group, ObjectType.CONFIG) for group in groups}, choices), end="")


def text(composed: DictConfig, options: Mapping[str, Sequence[str]], chosen: Mapping[str, object]) -> str:
    """Returns the help for a composed config, in lines of at most :data:`WIDTH`.

    Args:
        options: what there is to choose from, by group.
        chosen: the option of each group that the config has.

    Raises:
        UserError: the config is not whole.
    """
    config = to_config(composed)
    values = OmegaConf.to_container(composed, enum_to_str=True)
    assert isinstance(values, dict)
    examples = {" ".join((*RUN, words)): what for words, what in EXAMPLES.items()}
    examples |= UNDER_DEEPSPEED
    lines = [BEGINNING, *(f"  {command:<60}{what}".rstrip() for command, what in examples.items()), ""]
    lines += ["Choose one option a group, group=option; [these] are chosen now:", ""]
    for group in [*(name for name in GROUPS if name in options), *sorted(options.keys() - {*GROUPS})]:
        shown = [f"[{one}]" if one == chosen.get(group) else one for one in options[group]]
        lines += _filled(", ".join(shown), f"  {group:<11} ")
    lines += ["", "Change any key, key=value; these are the values now, and what is allowed:"]
    for group, keys in sections(type(config.engine)).items():
        lines += ["", f"{group}={chosen[group]}" if chosen.get(group) else group or "top level"]
        for key in keys:
            if key.name.partition(".")[2] != "name":  # the option sets it
                section = values if group == TOP else values[group]
                lines += _described(key, section[key.name.rpartition(".")[2]])
    return "\n".join([*lines, "", ENDING])


def _described(key: Key, value: object) -> Iterator[str]:
    """Yields the lines of one key."""
    left = f"  {key.name}={_shortened(value)}"
    allowed = _plain(": ".join(filter(None, (key.unit, key.allowed))))
    if len(left) + len(allowed) + 5 <= WIDTH:
        yield f"{left}   ({allowed})" if allowed else left
    else:
        yield left
        yield from _filled(f"({allowed})", " " * 6)
    if key.meaning:
        yield from _filled(_plain(key.meaning), " " * 6)


def _filled(words: str, indent: str) -> list[str]:
    return textwrap.wrap(
        words, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )


def _plain(text: str) -> str:
    return text.replace("`", "")


def _shortened(value: object) -> str:
    shown = written(value)
    return shown if len(shown) <= 40 or not isinstance(value, dict | list) else shown[0] + "..." + shown[-1]
