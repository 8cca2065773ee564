"""transformers, called so that the user sees one line: its chatter silenced, its exceptions explained."""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pickle import UnpicklingError

from harness.basics.errors import UserError, one_line


@contextmanager
def quiet(downloads: bool = False, stderr: bool = True) -> Iterator[None]:
    """Silences transformers, then restores what was set.

    Args:
        downloads: keep the hub's progress bars, since gigabytes in silence look like a hang.
        stderr: False also drops stderr, for the GGUF reader's bar, which has no switch.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), nullcontext() if stderr else redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if downloads:
            enable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@contextmanager
def as_user_error(field: str, where: str) -> Iterator[None]:
    """Turns what transformers raises for a bad checkpoint into a `UserError`; out of memory stays."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    caught = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
    try:
        with _unpickling(where):
            yield
    except (*caught, StrictDataclassError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise
        lines = str(error).strip().splitlines() or [""]
        first = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
        if "connect to" in first:
            first, remedy = "not in the local cache, and no network", "give a local directory"
        else:
            remedy = "use a checkpoint that the installed transformers can read"
        if isinstance(error, LookupError | TypeError | AttributeError):
            first = f"{type(error).__name__}: {first}"
        raise UserError(field, f"{where}: {one_line(first, 300)}", remedy) from error


@contextmanager
def _unpickling(where: str) -> Iterator[None]:
    """Says what a pickle is that torch, reading tensors alone, refuses: torch advises to run what is in it."""
    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        found = f"{where}: its pickled weights are damaged, or hold more than tensors; nothing in them was run"
        raise UserError("model.allow_pickle", found, "get them from where you trust, as safetensors") from error
