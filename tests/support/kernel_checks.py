"""What each Triton kernel between the matrix products must give: computed in float64, and within its own rounding.

Every check makes its inputs of a size, runs the kernel into outputs full of NaN, and returns by how much of its bound
the worst number is off, 0 to 1; it raises AssertionError where one is off by more, or is no number. A bound follows
from where the kernel rounds, so it holds for any input and any device.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from harness.engines.fastgen.runners.triton.kernels.activation import silu_and_multiply
from harness.engines.fastgen.runners.triton.kernels.norm import add_rms_norm
from harness.engines.fastgen.runners.triton.kernels.rotary import rotate_and_store
from harness.engines.fastgen.runners.triton.kernels.sampling import argmax, choose, embed
from support.rounding import SINGLE, near, tiny, unit


def normal(*size: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Returns normal numbers, the same every time."""
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def whole(numbers: list[int], device: str) -> Tensor:
    """Returns int32 numbers."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def unset(*size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Returns what a kernel has yet to write."""
    return torch.full(size, float("nan"), dtype=dtype, device=device)


def rounded_alike(got: Tensor, expected: Tensor) -> None:
    """Asserts that half-precision numbers are the same but for a few at an edge: rounded in the same places."""
    few = got.numel() < 200 or got.dtype is torch.float32
    same = float((got == expected).double().mean())
    assert few or same > 0.97, f"only {same:.1%} are rounded where Hugging Face rounds"


def norm(columns: int, adds: bool, dtype: torch.dtype, device: str, rows: int = 5) -> float:
    """Checks the residual sum and RMSNorm."""
    sizes = ((rows,), (rows,), ())
    residual, more, weight = (normal(*size, columns, dtype=dtype, device=device, seed=3) for size in sizes)
    total = residual + more if adds else residual.clone()
    out = unset(rows, columns, dtype=dtype, device=device)
    add_rms_norm(more if adds else None, residual, weight, 1e-5, out)
    assert torch.equal(residual, total), "the residual is not the sum, rounded once as torch rounds it"
    wide = total.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    hugging_face = weight * (total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    rounded_alike(out, hugging_face)
    # Two roundings to the type; the mean of squares is a sum of so many in float32.
    return near(out, exact, (2.01 * unit(dtype) + (columns + 8) * SINGLE) * exact.abs() + tiny(dtype))


def rotary(
    heads: int,
    kv_heads: int,
    head_dim: int,
    norms: bool,
    dtype: torch.dtype,
    device: str,
    tokens: int = 3,
    block_size: int = 16,
    longest: int = 40,
) -> float:
    """Checks the rotary embedding, with Qwen3's norms of each head or without, and where keys and values are stored."""
    half, blocks, pick = head_dim // 2, -(-tokens // block_size) + 3, random.Random(heads)
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    angle = torch.arange(float(longest))[:, None] * 0.2 ** torch.linspace(0, 4, half)
    cosines, sines = (1.2 * turn.to(device) for turn in (angle.cos(), angle.sin()))  # scaled, as YaRN scales them
    keys, values = (unset(blocks, kv_heads, block_size, head_dim, dtype=dtype, device=device) for _ in "kv")
    positions = [0, longest - 1, *(pick.randrange(longest) for _ in range(tokens - 2))]
    slots = pick.sample(range(blocks * block_size), tokens)
    weights = None
    if norms:
        one, other = (1 + 0.1 * normal(head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        weights = (one, other)
    before = qkv.clone().view(tokens, -1, head_dim)
    at, to = whole(positions, device), whole(slots, device)
    rotate_and_store(qkv, cosines, sines, at, to, keys, values, weights, 1e-6)
    after = qkv.view(tokens, -1, head_dim)
    assert torch.equal(after[:, heads:], before[:, heads:]), "keys and values are to be read there, not written"

    turned, roundings = before[:, : heads + kv_heads].double(), 0.0
    if weights is not None:
        scale = (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        factor = torch.stack([weights[0]] * heads + [weights[1]] * kv_heads).double()
        turned, roundings = turned * scale * factor, 2.01 * unit(dtype) + head_dim * SINGLE
    low, high = turned[..., :half], turned[..., half:]
    cosine, sine = (table[positions].double()[:, None] for table in (cosines, sines))
    exact = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
    spread = torch.cat([(low * cosine).abs() + (high * sine).abs(), (high * cosine).abs() + (low * sine).abs()], -1)
    bound = unit(dtype) * exact.abs() + (roundings + 4 * SINGLE) * spread + tiny(dtype)
    block, place = to.long() // block_size, to.long() % block_size
    off = near(torch.cat([after[:, :heads], keys[block, :, place]], 1), exact, bound)
    assert torch.equal(values[block, :, place], before[:, heads + kv_heads :]), "values are not stored as they came"
    for cache in (keys, values):
        assert int(cache.isfinite().sum()) == tokens * kv_heads * head_dim, "more of the cache is written than its own"
    return off


def silu(inner: int, dtype: torch.dtype, device: str, rows: int = 3) -> float:
    """Checks SiLU of the gate times the rest."""
    gate_up = 3 * normal(rows, 2 * inner, dtype=dtype, device=device)
    out = unset(rows, inner, dtype=dtype, device=device)
    silu_and_multiply(gate_up, out)
    first, second = gate_up.chunk(2, -1)
    gate, up = first.double(), second.double()
    exact = gate * gate.sigmoid() * up
    rounded_alike(out, torch.nn.functional.silu(first) * second)
    return near(out, exact, (2.01 * unit(dtype) + 16 * SINGLE) * exact.abs() + tiny(dtype))


def embedding(columns: int, vocabulary: int, dtype: torch.dtype, device: str, rows: int = 5) -> float:
    """Checks rows of ids, and of placeholders for what the pass before gave, one of which was no number."""
    pick = random.Random(columns)
    table = normal(vocabulary, columns, dtype=dtype, device=device)
    previous = [12, -1, vocabulary - 1]
    ids = [7, vocabulary - 1, *(pick.randrange(vocabulary) for _ in range(rows - 2))]
    sources = [*ids, -1, -3, -2]
    out = unset(len(sources), columns, dtype=dtype, device=device)
    embed(whole(sources, device), whole(previous, device), table, out)
    expected = table[[*ids, 12, vocabulary - 1, 0]]  # no number: the row is not to be used, nor read from elsewhere
    assert torch.equal(out, expected), "a row is not its id's"
    return 0.0


def best(columns: int, dtype: torch.dtype, device: str, rows: int = 2, levels: int = 5, seed: int = 0) -> float:
    """Checks each row's best, the lowest on ties, of a rank's part of the vocabulary; one row has no number."""
    first = 13 + seed
    random_levels = torch.Generator(device).manual_seed(seed)
    size = (rows + 1, columns)
    logits = torch.randint(-levels, levels, size, generator=random_levels, device=device).to(dtype)
    logits[:, seed % columns] = float("nan") if seed % 3 == 0 else float("-inf")
    logits[rows] = float("nan")
    ids, values = whole([9] * (rows + 1), device), unset(rows + 1, dtype=torch.float32, device=device)
    argmax(logits, ids, values, first)
    wide = logits.float().nan_to_num(float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    top = wide.amax(1)
    columns_at = torch.where(wide == top[:, None], torch.arange(columns, device=device), columns).amin(1)
    expected = torch.where(top == float("-inf"), -1, columns_at + first).int()
    assert torch.equal(ids, expected), "an id is not the lowest of the best"
    assert torch.equal(values, top), "a value is not the best"
    return 0.0


def best_of_ranks(ranks: int, device: str, rows: int = 1100) -> float:
    """Checks the choice among the ranks' best, the first rank's on ties; of one row no rank has a number."""
    values = torch.randint(0, 3, (ranks, rows), generator=torch.Generator().manual_seed(0)).float()
    ids = torch.arange(ranks * rows, dtype=torch.int32).view(ranks, rows)
    values[:, 5], ids[:, 5] = float("-inf"), -1
    chosen = whole([-7] * rows, device)
    choose(ids.to(device), values.to(device), chosen)
    ranked = torch.where(values == values.amax(0), torch.arange(ranks)[:, None], ranks).amin(0)
    expected = ids.gather(0, ranked[None])[0]
    assert torch.equal(chosen.cpu(), expected), "an id is not the first best rank's"
    return 0.0
