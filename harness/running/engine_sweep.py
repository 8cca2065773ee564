"""Sweeps over engines: ``-m engine=fastgen,ds_inference engine.token_budget=128,256``.

A key that an engine does not have is refused, but where the engine itself is swept, the combinations are the
sweeper's: a key of one of the engines is left out of the jobs of those that do not have it, and jobs that have become
the same run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from harness.config import flags
from harness.engines import catalogue

FORCED = "++"  # Hydra's mark for a key that is set whether or not the config has it


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs of a sweep, each with keys of its own engine alone.

    Attributes:
        words: each job's overrides.
        same: by job, which one's result it shares: its own, or that of an earlier one that is the same.
        notes: what was left out, a line for each engine.
    """

    words: list[list[str]]
    same: list[int]
    notes: list[str]


def lenient(arguments: Sequence[str]) -> list[str]:
    """Returns the command line of a sweep so that Hydra composes it where ``engine`` is swept.

    Each key of an engine that takes part is marked to be set in any case; :func:`jobs` takes the mark off again.
    """
    given = flags.parse(list(arguments)).overrides
    try:
        parsed = OverridesParser.create().parse_overrides(given)
    except HydraException:
        return list(arguments)  # Hydra will say what is wrong with it
    engines: list[str] = []
    for override in parsed:
        if override.key_or_group == "engine" and override.is_sweep_override():
            value = override.value()
            swept = (
                value.filter(list(catalogue.names())) if isinstance(value, Glob) else override.sweep_string_iterator()
            )
            engines += [name for name in map(str, swept) if name in catalogue.names()]
    keys = {f"engine.{key}" for name in engines for key in catalogue.find(name).keys}
    return [FORCED + word if word in given and word.partition("=")[0] in keys else word for word in arguments]


def plain(word: str) -> str:
    """Returns an override without the mark of :func:`lenient`."""
    return word.removeprefix(FORCED) if word.startswith(f"{FORCED}engine.") else word


def jobs(overrides: Sequence[Sequence[str]]) -> Jobs:
    """Returns the jobs that a sweeper has made up, without the keys that :func:`lenient` let through for others."""
    found = Jobs([], [], [])
    first: dict[tuple[str, ...], int] = {}
    dropped: dict[str, list[str]] = {}
    for number, words in enumerate(overrides):
        name = next((word.partition("=")[2] for word in reversed(words) if word.startswith("engine=")), "")
        known = name in catalogue.names()
        keys = catalogue.find(name).keys if known else ()
        own = []
        for word in words:
            key = word.partition("=")[0].removeprefix(f"{FORCED}engine.")
            if word.startswith(f"{FORCED}engine.") and known and key not in keys:
                dropped.setdefault(name, []).append(key)
            else:
                own.append(plain(word))
        short = len(own) < len(words)
        found.words.append(own)
        found.same.append(first.setdefault(tuple(own), number) if short else number)
    for name, left_out in dropped.items():
        found.notes.append(f"engine={name} has no {', '.join(dict.fromkeys(left_out))}: left out of its jobs")
    if repeated := sum(number != same for number, same in enumerate(found.same)):
        found.notes[-1] += f"; {repeated} that would be the same {'is' if repeated == 1 else 'are'} not run again"
    return found
