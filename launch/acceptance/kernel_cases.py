"""The sizes at which the stage ``kernels`` checks: LLaMA's on a GPU, tiny ones where Triton is interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from support import kernel_checks
from support.attention import Ragged, Shape

HALVES = (torch.float16, torch.bfloat16)
Checks = dict[str, Callable[[], float]]  # by the size they are of
Span = tuple[int, int]  # a chunk's first position, and its tokens


@dataclass(frozen=True)
class Heads:
    """A model's heads on one rank, and what is checked with them.

    Attributes:
        group: query heads to a key-value head.
        splits: parts that the keys of decodes are cut into, each with a kernel of its own.
        block_size: tokens of a block of the KV cache.
    """

    name: str
    head_dim: int
    group: int
    kv_heads: int
    dtypes: tuple[torch.dtype, ...]
    splits: tuple[int, ...]
    block_size: int = 64

    def ragged(self, spans: list[Span], dtype: torch.dtype, device: str) -> Ragged:
        """Returns a ragged batch of such heads, with what is exact of it."""
        return Ragged(Shape(self.head_dim, self.group, self.kv_heads, self.block_size, dtype, device), spans, 0)


# Decodes and chunks of prompts that begin, go on and end, in any order, up to 4096 tokens.
SPANS: list[Span] = [
    *[(3000, 1), (17, 1), (0, 1), (1, 1), (0, 700), (513, 300), (1024, 1), (2047, 1), (0, 15), (4095, 1)],
    *[(3596, 500), (63, 64), (64, 1), (127, 2)],
]
TINY_SPANS: list[Span] = [(70, 1), (16, 1), (0, 20), (33, 9), (0, 1)]
HEADS = (
    Heads("70B over 8 ranks", 128, 8, 1, HALVES, (1, 4, 16)),
    Heads("7B", 128, 1, 32, HALVES, (1, 8)),
    Heads("Llama-3 8B", 128, 4, 8, HALVES, (1, 8)),
    Heads("heads of 64", 64, 3, 3, (torch.float16,), (1, 2), 32),
    Heads("heads of 80", 80, 4, 2, (torch.bfloat16,), (1, 8), 128),
    Heads("heads of 96", 96, 1, 4, (torch.float16,), (1, 8), 16),
)
TINY_HEADS = (
    Heads("70B over 8 ranks", 128, 8, 1, (torch.bfloat16,), (1, 2), 32),
    Heads("7B", 128, 1, 2, (torch.float16,), (1, 4), 16),
    Heads("Llama-3 8B", 128, 4, 1, (torch.float16,), (1,), 16),
    Heads("heads of 64", 64, 3, 1, (torch.bfloat16,), (1,), 64),
    Heads("heads of 80", 80, 4, 1, (torch.float16,), (1,), 16),
    Heads("heads of 96", 96, 1, 2, (torch.bfloat16,), (1,), 16),
)


@dataclass(frozen=True)
class Sizes:
    """What the kernels between the matrix products are checked at.

    Attributes:
        hidden: columns of a residual.
        heads: query heads, key-value heads, size of a head, and whether each has a norm (Qwen3).
        inner: columns of the MLP.
        embeddings: hidden size and vocabulary.
        logits: columns.
        rows: tokens of a pass.
    """

    hidden: tuple[int, ...]
    heads: tuple[tuple[int, int, int, bool], ...]
    inner: tuple[int, ...]
    embeddings: tuple[tuple[int, int], ...]
    logits: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: int
    longest: int
    block_size: int


SIZES = Sizes(
    hidden=(4096, 5120, 8192),
    heads=((32, 32, 128, False), (8, 1, 128, False), (32, 8, 128, True), (9, 3, 64, False), (28, 4, 128, False)),
    inner=(11008, 13824, 3584),
    embeddings=((4096, 32000), (8192, 32000)),
    logits=(32000, 4000, 128256),
    ranks=(2, 8),
    rows=300,
    longest=4096,
    block_size=64,
)
TINY_SIZES = Sizes(
    hidden=(128, 576),
    heads=((4, 4, 64, False), (8, 1, 128, False), (4, 2, 128, True)),
    inner=(1100,),
    embeddings=((576, 50),),
    logits=(320, 5000),
    ranks=(8,),
    rows=5,
    longest=60,
    block_size=16,
)


def between(sizes: Sizes, device: str) -> Iterator[tuple[str, Checks]]:
    """Yields a name, and checks by the size they are of, for each kernel between the matrix products and each type."""
    rows = sizes.rows
    for dtype in HALVES:
        kind = str(dtype).removeprefix("torch.")
        norms: Checks = {
            f"columns_{columns}{'_added' * adds}": partial(kernel_checks.norm, columns, adds, dtype, device, rows)
            for columns in sizes.hidden
            for adds in (False, True)
        }
        yield f"residual and norm {kind}", norms
        place = (dtype, device, rows, sizes.block_size, sizes.longest)
        turned: Checks = {
            f"heads_{one}_{other}_{dim}{'_norms' * norms}": partial(
                kernel_checks.rotary, one, other, dim, norms, *place
            )
            for one, other, dim, norms in sizes.heads
        }
        yield f"rotary and cache {kind}", turned
        lit: Checks = {
            f"columns_{inner}": partial(kernel_checks.silu, inner, dtype, device, rows) for inner in sizes.inner
        }
        yield f"silu times up {kind}", lit
        embedded: Checks = {
            f"hidden_{hidden}_of_{most}": partial(kernel_checks.embedding, hidden, most, dtype, device, rows)
            for hidden, most in sizes.embeddings
        }
        yield f"embedding {kind}", embedded
        best: Checks = {
            f"columns_{columns}_seed_{seed}": partial(kernel_checks.best, columns, dtype, device, rows, seed=seed)
            for columns in sizes.logits
            for seed in (0, 1)
        }
        yield f"argmax {kind}", best
    yield "choice among ranks", {f"ranks_{n}": partial(kernel_checks.best_of_ranks, n, device) for n in sizes.ranks}
