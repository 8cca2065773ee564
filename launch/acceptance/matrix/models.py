"""The models of the matrix: their checkpoints, or weights that are made up in every run where the disk has no room."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acceptance.commands import command
from acceptance.findings import Outcome
from acceptance.matrix import weights
from acceptance.stage import Stage
from harness.basics.cache import cache_root

OPTIONS = {"7B": "llama2_7b", "13B": "llama2_13b", "70B": "llama2_70b"}
# What a rehearsal has in place of each: as many entries in the vocabulary, all else tiny.
TINY: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "13B": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "70B": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
}
TINY_KV_HEADS = {"7B": 4, "13B": 4, "70B": 2}
DTYPE = "bfloat16"
WRITE_S = 240.0


@dataclass(frozen=True)
class Model:
    """One of them.

    Attributes:
        architecture: its sizes.
        overrides: that have the harness run it.
        checkpoint: its directory; None where its weights are made up in the run.
    """

    architecture: dict[str, Any]
    overrides: tuple[str, ...]
    checkpoint: Path | None


def architecture_of(stage: Stage, size: str) -> dict[str, Any]:
    """Returns the sizes of a model, in a rehearsal those of the tiny one in its place."""
    changed = TINY[size] | {"num_key_value_heads": TINY_KV_HEADS[size]} if stage.rehearse else {}
    return weights.architecture(OPTIONS[size], **changed)


class Models:
    """Each is written when it is first asked for; the others are removed where the disk has no room beside them.

    Args:
        tokenizer: a directory with the files of theirs.
    """

    def __init__(self, stage: Stage, tokenizer: Path) -> None:
        self.stage, self.tokenizer = stage, tokenizer
        # Not among the findings, which are carried away; each acceptance has a place of its own.
        own = hashlib.sha256(str(stage.out).encode()).hexdigest()[:8]
        self.root = cache_root() / "acceptance" / f"{stage.out.name}-{own}"
        self._known: dict[str, Model] = {}

    @staticmethod
    def vocabulary(stage: Stage) -> int:
        """Returns how many entries they have."""
        return int(architecture_of(stage, "7B")["vocab_size"])

    def get(self, size: str) -> Model:
        """Returns a model, its checkpoint written if that was not done."""
        if size not in self._known:
            self._known[size] = self._made(size)
        return self._known[size]

    def dummy(self, size: str, **changed: Any) -> Model:
        """Returns a model whose weights are made up in the run, with some of its sizes changed."""
        sizes = architecture_of(self.stage, size) | changed
        own = weights.architecture(OPTIONS[size])
        words = [f"model.architecture.{key}={value}" for key, value in sizes.items() if own.get(key) != value]
        tokenizer = f"model.tokenizer='{self.tokenizer}'"
        overrides = (f"model={OPTIONS[size]}", "model.weights=dummy", f"model.dtype={DTYPE}", tokenizer, *words)
        return Model(sizes, overrides, None)

    def remove(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _made(self, size: str) -> Model:
        sizes, directory = architecture_of(self.stage, size), self.root / f"llama2-{size.lower()}-width"
        self.root.mkdir(parents=True, exist_ok=True)
        if weights.written(directory) is None and weights.lacking(self.root, sizes, DTYPE) is not None:
            self.remove()
            self._known.clear()
        words = ["-m", "acceptance.matrix.weights", str(directory), json.dumps(sizes), DTYPE, self.stage.device]
        done = command(self.stage, f"write {size}", [*words, str(self.tokenizer)], WRITE_S)
        name = f"{size} checkpoint"
        if done.status:
            why = f"{done.how}; its weights are made up in every run, which not every engine takes"
            self.stage.report(name, Outcome.refused if done.refused else Outcome.failed, why)
            return self.dummy(size)
        written = json.loads(done.stdout.splitlines()[-1])
        figures = {"bytes": written["size"], "write_s": written["seconds"], "shards": written["shards"]}
        figures["bytes_per_s"] = written["size"] / max(written["seconds"], 0.01)
        layers = sizes["num_hidden_layers"]
        detail = f"{DTYPE}, {layers} layers of {sizes['hidden_size']}, random weights, in safetensors"
        self.stage.report(name, Outcome.passed, detail, **figures)
        overrides = (f"model={OPTIONS[size]}", f"model.path='{directory}'", f"model.dtype={DTYPE}")
        return Model(sizes, overrides, directory)
