"""The tables of keys in ``conf/README.md``, made of what the schema says; run as a program, it writes them anew.

PYTHONPATH=.:tests python tests/support/keys_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from harness.config.engine_schemas import registered
from harness.config.reference import TOP, Key, sections, written
from harness.engines.catalogue import register

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "conf" / "README.md"
OF_TOP_LEVEL = (TOP, "sweep")  # sections of the table below the heading "Top level"
OF_THE_OPTION = "of the option"  # a default that is a table of figures
TABLE = re.compile(r"^(\| key \| unit \|.*\n\| ---.*\n)((?:\|.*\n)*)", re.MULTILINE)


def option(*words: str) -> dict[str, Any]:
    """Returns the config that these overrides compose to, its keys with dots; dictionaries of figures are one key."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = compose("config", list(words))
    assert isinstance(whole, DictConfig)
    data = OmegaConf.to_container(whole, enum_to_str=True)
    assert isinstance(data, dict)
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {str(name): value}
    return found


def rows(heading: str) -> list[str]:
    """Returns the rows that the table below a heading has: ``engine=NAME``, a group's name or ``Top level``."""
    name = heading.partition("=")[2] or "fastgen"
    values = option(f"engine={name}")
    said = sections(registered()[name])
    groups = ("engine",) if "=" in heading else OF_TOP_LEVEL if heading == "Top level" else (heading,)
    return [_row(key, values[key.name]) for group in groups for key in said[group] if key.name != "engine.name"]


def rewritten(document: str) -> str:
    """Returns ``conf/README.md`` with the rows of its tables of keys as they should be."""
    parts = re.split(r"^(?=## )", document, flags=re.MULTILINE)
    return "".join(_with_rows(part, part.partition("\n")[0].removeprefix("## ")) for part in parts)


def _with_rows(part: str, heading: str) -> str:
    if not TABLE.search(part):
        return part
    return TABLE.sub(lambda match: match[1] + "".join(f"{row}\n" for row in rows(heading)), part)


def _row(key: Key, value: object) -> str:
    default = OF_THE_OPTION if isinstance(value, dict) and value else f"`{written(value)}`"
    cells = [f"`{key.name}`", key.unit, default, key.allowed, key.meaning]
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
