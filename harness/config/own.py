"""Options of the user's own, where ``conf/`` takes none: an installed package is replaced, or cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.basics.cache import cache_root
from harness.basics.files import can_write
from harness.basics.places import CHECKOUT, CONF

USUAL_RESULTS = "results"


def own_options() -> Path:
    """Returns the directory beside ``conf/`` whose options Hydra finds too; it need not exist."""
    return cache_root() / "conf"


def tuned_options(results_dir: str | Path) -> Path:
    """Returns the directory of options that searches have written beside their results; it need not exist."""
    return Path(results_dir) / "tuned"


def results_of(words: Sequence[str]) -> str:
    """Returns the ``results_dir`` that a command line names, or the usual one."""
    given = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("results_dir=")]
    value = given[-1].strip() if given else USUAL_RESULTS
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def own_option(group: str, name: str) -> Path:
    """Returns where an option that a program writes belongs: in the checkout, else in :func:`own_options`."""
    path = CONF / group / f"{name}.yaml"
    if path.exists():  # it would be found before another one
        return path
    try:
        if CHECKOUT and can_write(path.parent) == path.parent:
            return path
    except OSError:
        pass
    return own_options() / group / path.name
