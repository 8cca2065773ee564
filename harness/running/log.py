"""The log of a run."""

from __future__ import annotations

import logging
import warnings

from harness.basics.errors import printable

log = logging.getLogger("harness")


class _Handler(logging.FileHandler):
    """Does without the lines that cannot be written: a full disk has an error line of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Formatter(logging.Formatter):
    """Escapes what a terminal that shows the log would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def log_to(path: str) -> None:
    handler = _Handler(path, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    log.disabled = False  # Hydra, told to log nothing, disables all loggers that it finds
    logging.captureWarnings(True)
    warnings.simplefilter("default")
