"""Where a model comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIVE_PATH = "give the directory of a checkpoint (config.json and *.safetensors) or a GGUF file"


@dataclass(frozen=True, slots=True)
class Source:
    """What `locate.locate` found: enough to plan with, and to load from."""

    kind: str  # "directory", "gguf", "hub", "dummy", or "described" for one that is only planned with
    path: str | None  # the directory, the GGUF file's directory, or the hub id
    gguf_file: str | None  # the file's name in `path`
    tokenizer: str | None  # directory, GGUF file or hub id; None is the byte tokenizer
    architecture: dict[str, Any]  # config.json's keys; {} for a hub id that is not in the local cache
    trust_remote_code: bool
    pickled: bool = False  # the weights are pickles (of a hub id: may be), and model.allow_pickle lets them be read
