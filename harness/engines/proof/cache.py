"""Proofs that an engine has given before: for the same weights, code, settings and kind of machine it holds."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.basics.cache import cache_root
from harness.basics.errors import UserError
from harness.basics.files import json_bytes, replace
from harness.engines import catalogue
from harness.engines.base import EngineSettings
from harness.machine import device, snapshot
from harness.models.fingerprint import fingerprint

LIBRARIES = ("torch", "transformers", "deepspeed", "deepspeed-kernels", "triton")


def root() -> Path:
    """Returns the directory of the proofs; it need not exist yet."""
    return cache_root() / "proofs"


def key(settings: EngineSettings, kernels: str, facts: Mapping[str, Any] | None = None) -> str | None:
    """Returns the name under which a proof is kept; None for weights that cannot be told from others.

    Args:
        kernels: what computes the passes, ``auto`` resolved.
        facts: what the record says of them beside.
    """
    weights = fingerprint(settings.source)
    if weights is None:
        return None
    room = catalogue.find(settings.engine.name)
    keys = room.keys if room.proof_keys is None else room.proof_keys
    accelerator = "cpu" if settings.device == "cpu" else "cuda"
    whole = [
        weights,
        snapshot.code_fingerprint(),
        [_version(name) for name in LIBRARIES],
        [room.name, *(str(getattr(settings.engine, key)) for key in keys)],
        [
            kernels,
            dict(facts or {}),
            settings.dtype,
            settings.tp,
            settings.max_context,
            settings.source.trust_remote_code,
        ],
        [accelerator, device.device_name(accelerator), sorted(device.cpu_flags())],
    ]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def read(key: str) -> dict[str, Any] | None:
    """Returns what is known of a proof; None where there is none."""
    try:
        found = json.loads((root() / f"{key}.json").read_bytes())
    except (OSError, ValueError, UserError):
        return None
    return found if isinstance(found, dict) and "bound" in found else None


def write(key: str, found: dict[str, Any]) -> None:
    """Keeps a proof; a cache that cannot be written costs seconds, and no more."""
    with contextlib.suppress(OSError, UserError):
        root().mkdir(parents=True, exist_ok=True)
        replace(root() / f"{key}.json", json_bytes(found))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
