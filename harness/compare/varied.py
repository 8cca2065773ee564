"""Which of the settings that differ were anybody's choice: what a command line or a sweep set."""

from __future__ import annotations

from collections.abc import Sequence

from harness.compare.groups import Group
from harness.results.columns import TABLE

GROUPS_BY_NAME = ("engine", "model", "dataset", "hardware")
# What a run found out: no choice, even where an overlay was one.
FOUND_OUT = {column.setting for column in TABLE if column.setting is not None and column.config is None}
MACHINE = "device_name"  # who compares machines has chosen them


def varied(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """Returns those of ``keys`` that were set for some run of ``groups``; all where a run does not say what was.

    An option of a group without a name of its own among the keys, such as ``parallel=tp2``, sets all keys of the group;
    an overlay (``experiment=``) may set any.
    """
    asked: set[str] = set()
    for one in groups:
        words = one.shown.asked()
        if words is None:
            return list(keys)
        asked |= words

    def chosen(key: str) -> bool:
        if key in asked or key == MACHINE:
            return True
        group, dot, _ = key.partition(".")
        if dot and group in asked and (group not in GROUPS_BY_NAME or group not in keys):
            return True
        return "experiment" in asked and key not in FOUND_OUT

    return [key for key in keys if chosen(key)]
