"""Which groups are compared, and with which of them: ``--where`` and ``--baseline``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from harness.basics.errors import UserError, quoted
from harness.compare.groups import Group
from harness.compare.reading import DIGESTS, KEYS, settings_of, shown


def named_baseline(groups: list[Group], name: str) -> Group:
    """Returns the group with a run of this id, or with the only run id that has ``name`` in it.

    Raises:
        UserError: there is no such run, several, or it is not ok.
    """
    remedy = "take one from the first column of the table"
    owners = {run.run_id: one for one in groups for run in one.runs}
    matches = [name] if name in owners else [run_id for run_id in owners if name and name in run_id]
    if not matches:
        near = difflib.get_close_matches(name, list(owners)[-1000:], n=3, cutoff=0.5)
        raise UserError(
            "--baseline", f"no run id has {quoted(name)} in it", f"near: {', '.join(near)}" if near else remedy
        )
    chosen = owners[matches[0]]
    if any(owners[run_id] is not chosen for run_id in matches):
        more = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
        raise UserError("--baseline", f"{quoted(name)} is in {', '.join(matches[:3])}{more}", "give more of the run id")
    run = next(run for run in chosen.runs if run.run_id == matches[0])
    if chosen.ok == 0 or (name == run.run_id and not run.ok):
        status = run.cells.get("status") or "of unknown status"
        other = f"its repetition {chosen.run_id} is" if chosen.ok else "name a run that is"
        raise UserError("--baseline", f"{run.run_id} is {status}, not ok", other)
    return chosen


def usual_baseline(groups: list[Group]) -> tuple[Group | None, str]:
    """Returns the group that ratios are to where none was named, and why it is; None when no run is ok."""
    finished = sorted((one for one in groups if one.throughput), key=lambda one: (one.simulated != "", one.started_at))
    plain = [one for one in finished if one.shown.cells.get("engine") == "baseline"]
    if plain:
        return plain[0], f"the {'only' if len(plain) == 1 else 'oldest'} one with engine=baseline"
    return (finished[0], "the oldest") if finished else (None, "no run is ok")


def filtered(groups: list[Group], where: Iterable[str]) -> list[Group]:
    """Returns the groups that meet all conditions; ``status`` is one of a group's runs.

    Raises:
        UserError: a condition is none, names a key that no run has, or leaves no group.
    """
    conditions: dict[str, list[str]] = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals or not key.strip():
            raise UserError("--where", f"{quoted(condition)} is not KEY=VALUE", "for example engine.token_budget=256")
        key = key.strip().removesuffix(".name")
        conditions.setdefault(KEYS.get(key, key), []).append(value.strip())
    if not conditions:
        return list(groups)
    for one in groups:
        one.settings = settings_of(one.runs)
    known = {"status", "config_hash", "run_id", *KEYS.values(), *(key for one in groups for key in one.settings)}
    kept = list(groups)
    for key, values in conditions.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *KEYS], n=3, cutoff=0.5)
            raise UserError(
                "--where", f"no run has a key {quoted(key)}", f"near: {', '.join(near)}" if near else "see --help"
            )
        before, kept = kept, [one for one in kept if any(_meets(one, key, value) for value in values)]
        if not kept:
            texts = {text for one in before for text in _texts(one, key)}
            there = sorted(texts, key=lambda text: (_number(text) or 0.0, text))
            has = (
                f"there: {', '.join(there[:5])}" + (", ..." if len(there) > 5 else "")
                if there
                else "it is unknown there"
            )
            raise UserError("--where", f"no group left with {key}={' or '.join(values)}", has)
    return kept


def _texts(one: Group, key: str) -> list[str]:
    if key in ("status", "config_hash", "run_id"):
        return [run.cells.get(key, "") for run in one.runs]
    return [shown("", one.settings[key])] if key in one.settings else []


def _meets(one: Group, key: str, value: str) -> bool:
    if key in (*DIGESTS, "config_hash"):
        return any(value and text.startswith(value) for text in _texts(one, key))
    return any(text == value or _number(text) == _number(value) is not None for text in _texts(one, key))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
