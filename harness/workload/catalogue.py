"""The dataset formats there are: the modules of :mod:`harness.workload.formats` that have a ``FORMAT``.

A format is added by a module there and an option in ``conf/dataset/``; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.basics.errors import UserError, quoted
from harness.workload import formats
from harness.workload.formats.base import Format


def known() -> dict[str, Format]:
    """Returns the formats by name: first those that need no file of the user's, then the others."""
    names = [module.name for module in pkgutil.iter_modules(formats.__path__)]
    modules = [importlib.import_module(f"{formats.__name__}.{name}") for name in names]
    found: list[Format] = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {one.name: one for one in sorted(found, key=lambda one: (one.makes_requests, one.takes("path"), one.name))}


def find(name: str) -> Format:
    """Returns the format that ``dataset.name`` names; raises UserError where there is none."""
    found = known()
    if name not in found:
        *others, last = found
        raise UserError("dataset.name", f"unknown dataset {quoted(name)}", f"use {', '.join(others)} or {last}")
    return found[name]


def settings_of(name: str) -> list[str]:
    """Returns the keys of ``conf/dataset`` that settle, beside the file, what is asked; none for an unknown name."""
    found = known().get(name)
    return [] if found is None else found.settings


def taking(key: str) -> str:
    """Returns the options that take a key of ``conf/dataset``, for an error message."""
    *others, last = [f"dataset={name}" for name, one in known().items() if one.takes(key)]
    return f"{', '.join(others)} or {last}" if others else last
