"""Tiny random checkpoints of several families with the demo model's tokenizer, written on the spot.

Their sizes are ones that Triton's and DeepSpeed's kernels take, and their weights large enough for every part of the
model to show in its tokens. ``python -m acceptance.tiny_models FOLDER FAMILY...`` writes them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acceptance.commands import Steps, command_steps
from acceptance.stage import Stage
from harness.models import demo

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 49152,  # the tokenizer's
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,  # what MII computes with, whatever the model says
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# By name: the family, and what it has beside SIZES, or in place of it. "deep" is for runs that take a while
# on a CPU.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-128": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "phi3": ("phi3", {}),
    "deep": ("llama", {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}),
}


def directory(folder: Path, name: str) -> Path:
    """Returns where the model of :data:`MODELS` lies in ``folder``."""
    return folder / f"tiny-{name}"


def write(folder: Path, name: str) -> Path:
    """Writes one of :data:`MODELS` in bfloat16 unless it is there; returns its directory."""
    import torch
    from support.models import save_model

    place = directory(folder, name)
    if place.exists():
        return place
    family, more = MODELS[name]
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(unfinished, family, torch.bfloat16, **{**SIZES, **more})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.ensure() / file, unfinished)
    return unfinished.rename(place)


def write_steps(stage: Stage, folder: Path, names: Sequence[str]) -> Steps[None]:
    """Writes models in a process of its own, so that a stage needs no torch; raises RuntimeError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = yield from command_steps(stage, "tiny models", ["-m", "acceptance.tiny_models", str(folder), *names], 120.0)
    if ended.status != 0:
        raise RuntimeError(f"the tiny models could not be written: {ended.how}")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(write(Path(sys.argv[1]), name))
