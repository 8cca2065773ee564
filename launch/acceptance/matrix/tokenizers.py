"""A tokenizer with as many entries as LLaMA-2's: its own where somebody has brought it, else one cut from the demo's.

The demo model's has 49,152 entries, more than these models' vocabulary of 32,000. Merges of a byte-level BPE build on
earlier ones only, so its first entries are a tokenizer by themselves; it takes a few more tokens for a text.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from acceptance.matrix.weights import TOKENIZER_FILES
from harness.basics.errors import UserError
from harness.models import demo

VARIABLE = "ACCEPTANCE_TOKENIZER"


def make(directory: Path, entries: int) -> str:
    """Puts a tokenizer of at most so many entries into ``directory``; returns which, for the finding.

    Raises:
        UserError: what the variable names is no directory with a tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    given = os.environ.get(VARIABLE)
    source = Path(given).expanduser() if given else demo.ensure()
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise UserError(VARIABLE, f"{source} has no {name}", "give a directory that has it, or unset it")
        shutil.copy(source / name, directory)
    if given:
        return f"the tokenizer in {VARIABLE}"
    path = directory / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(cut(whole, entries), ensure_ascii=False))
    return f"the demo model's tokenizer, cut to its first {entries:,} entries"


def cut(tokenizer: dict[str, Any], entries: int) -> dict[str, Any]:
    """Returns ``tokenizer.json`` of a BPE whose ids begin with those of its parts, with the first ``entries`` alone.

    Raises:
        ValueError: its merges do not build on earlier entries alone.
    """
    model = tokenizer["model"]
    vocab = {text: number for text, number in model["vocab"].items() if number < entries}
    merges = [merge for merge in model["merges"] if "".join(_parts(merge)) in vocab]
    if any(part not in vocab for merge in merges for part in _parts(merge)):
        raise ValueError("this tokenizer cannot be cut: an entry is merged of later ones")
    added = [one for one in tokenizer["added_tokens"] if one["id"] < entries]
    return tokenizer | {"model": model | {"vocab": vocab, "merges": merges}, "added_tokens": added}


def _parts(merge: list[str] | str) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
