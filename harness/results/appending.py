"""The files of a run that grow line by line."""

from __future__ import annotations

import errno
import os

PASSES_FLUSH_S = 1.0


def _close_file(descriptor: int | None) -> None:
    """Closes a file whose content is to outlast a power cut, since the row will say that it is there."""
    if descriptor is None:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a special file, or a file system that knows of no such thing
            raise
    finally:
        os.close(descriptor)
