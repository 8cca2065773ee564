"""The requests of the matrix: the challenge's file where it is at hand, else as many of its published shape.

``$ACCEPTANCE_DATA`` names the file of ``[prompt, prompt_len, output_len]``. Without it prompts are pieces of the texts
that the harness ships, cut to drawn lengths; how long they are is counted, so nothing rests on what was drawn.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench_scheduler import lengths as drawn
from tokenizers import Tokenizer

from harness.basics.files import replace as replace_file
from harness.config.schema import DatasetConfig
from harness.costs.lengths import Lengths
from harness.costs.lengths import of as lengths_of
from harness.workload import reading
from harness.workload.formats.sample import SAMPLE_PATH
from harness.workload.records import Request

VARIABLE = "ACCEPTANCE_DATA"


@dataclass(frozen=True)
class Requests:
    """A file of requests in the challenge's format.

    Attributes:
        said: where they are from, for the finding.
        cap: most output tokens of a request; None for what the file says.
    """

    path: Path
    said: str
    cap: int | None = None

    def overrides(self, count: int) -> tuple[str, ...]:
        """Returns what has the harness run the first ``count`` of them."""
        quoted = str(self.path).replace("\\", "\\\\").replace("'", "\\'")
        cap = () if self.cap is None else (f"generation.max_output_len={self.cap}",)
        return ("dataset=asc24", f"dataset.path='{quoted}'", f"dataset.num_samples={count}", *cap)

    def lengths(self, count: int, context: int) -> Lengths:
        """Returns the lengths of the first ``count``, as the file states them."""
        return lengths_of(_read(self.path)[:count], context, self.cap)

    @property
    def available(self) -> int:
        """How many requests the file has."""
        return len(_read(self.path))


@cache
def _read(path: Path) -> list[Request]:
    return reading.read(DatasetConfig(name="asc24", path=str(path))).requests


def find(folder: Path, tokenizer: Path, count: int, cap: int | None = None) -> Requests:
    """Returns the file that the variable names, or one made in ``folder``.

    Args:
        tokenizer: a directory with ``tokenizer.json``, which counts the made ones.
        count: how many of these there are to be.
        cap: see :class:`Requests`.
    """
    given = os.environ.get(VARIABLE)
    if given:
        path = Path(given).expanduser().absolute()
        return Requests(path, f"the first of {path.name}", cap)
    path = folder / f"requests-{count}.json"
    if not path.exists():
        replace_file(path, json.dumps(made(tokenizer, count), ensure_ascii=False).encode())
    said = f"pieces of the shipped sample, in lengths as the challenge publishes them ({VARIABLE} is not set)"
    return Requests(path, said, cap)


def made(tokenizer: Path, count: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """Returns made requests: prompts of 4 to about 1,024 tokens, outputs of 4 to 1,024, both lognormal."""
    texts = [json.loads(line)["prompt"] for line in SAMPLE_PATH.read_text().splitlines()]
    rng = random.Random(seed)
    known = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found: list[tuple[str, int, int]] = []
    while len(found) < count:
        rng.shuffle(texts)
        whole = "\n".join(texts)
        places = known.encode(whole, add_special_tokens=False).offsets
        begin = 0
        while len(found) < count:
            prompt, output = drawn(rng)
            if begin + prompt > len(places):
                break
            text = whole[places[begin][0] : places[begin + prompt - 1][1]]
            begin += prompt
            if text.strip():
                found.append((text, len(known.encode(text).ids), output))
    return found
