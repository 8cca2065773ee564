"""Models of a hub: their ids, what of one is in the local cache, and whether the hub can be reached at all."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from harness.basics.errors import UserError
from harness.models.source import GIVE_PATH


def is_hub_id(path: str) -> bool:
    """Returns whether ``path`` can be a hub's ``OWNER/NAME``."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.gguf)", path) is not None


def cached_config(hub_id: str) -> Path | None:
    """Returns a model's ``config.json`` in the local cache; None where it is still to be fetched.

    Raises:
        UserError: it is not there, and the hub cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    if not reachable():
        raise UserError("model.path", f"{hub_id} is not in the local cache, and its hub cannot be reached", GIVE_PATH)
    return None


def reachable() -> bool:
    """Returns whether the hub's name can be looked up; without this its client retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy looks it up
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
