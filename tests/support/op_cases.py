"""DeepSpeed's ragged ops as its models call them: inputs, the call, and what is exact of the results.

One implementation is compiled, the other is :mod:`support.deepspeed_kernels`. Both round where a bound says so, of
what float64 gives for the same inputs, and so they are within twice of it of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.engines.shared import deepspeed_ops
from support.attention import Ragged, Shape
from support.deepspeed_kernels import Kernels
from support.kernel_checks import normal, unset
from support.op_batches import Batch, Sizes, block_sizes, built_atoms
from support.rounding import SINGLE, near, tiny, unit

SIGLU, IDENTITY = 5, 6  # kernels/includes/activation_type.h
Outputs = dict[str, Tensor]


@dataclass
class Case:
    """One op with inputs.

    Attributes:
        tensors: inputs, and room for outputs; on the device on which they were made.
        call: computes with kernels, tensors on their device and the batch there; returns the outputs.
        exact: of each output what is exact, float64, and how far rounding may take one implementation from it.
        chunks: spans and blocks of the batch, and a block that is no one's; None where the op needs none.
    """

    tensors: dict[str, Tensor]
    call: Callable[[Any, dict[str, Tensor], Any], Outputs]
    exact: dict[str, tuple[Tensor, Tensor]]
    chunks: tuple[list[tuple[int, int]], list[list[int]], int] | None = None

    def outputs(self, kernels: Any, device: str) -> Outputs:
        """Returns what these kernels give on this device."""
        tensors = {name: tensor.to(device, copy=True) for name, tensor in self.tensors.items()}
        batch = None if self.chunks is None else Batch.of(*self.chunks, device)
        found = self.call(kernels, tensors, batch)
        return {name: found[name] for name in self.exact}

    def check(self, kernels: Any, device: str) -> dict[str, float]:
        """Returns the largest distances as shares of their bounds: of both from what is exact, and of one another.

        Raises:
            AssertionError: one is larger than its bound; it says which.
        """
        found, stood = self.outputs(kernels, device), self.outputs(Kernels, "cpu")
        shares: dict[str, float] = {}
        equal = total = 0
        for name, (exact, bound) in self.exact.items():
            pairs = {
                "kernel_from_exact": (found[name], exact, bound),
                "stand_in_from_exact": (stood[name], exact, bound),
                "kernel_from_stand_in": (found[name], stood[name], 2 * bound),
            }
            for what, pair in pairs.items():
                try:
                    shares[what] = max(shares.get(what, 0.0), near(*pair))
                except AssertionError as error:
                    raise AssertionError(f"{name}, {what.replace('_', ' ')}: {error}") from error
            equal += int((found[name].cpu() == stood[name].cpu()).sum())
            total += stood[name].numel()
        return shares | {"same_bits": equal / total}


class Compiled:
    """DeepSpeed's compiled ops, of all its extensions together.

    Raises:
        OpsError: they cannot be built or loaded.
    """

    def __init__(self) -> None:
        deepspeed_ops.load(deepspeed_ops.RAGGED)
        self._extensions = [deepspeed_ops.builder_of(name).load(False) for name in deepspeed_ops.RAGGED]

    def __getattr__(self, name: str) -> Any:
        for extension in self._extensions:
            if hasattr(extension, name):
                return getattr(extension, name)
        raise AttributeError(f"no extension of DeepSpeed's has {name}")


def cases(sizes: Sizes, dtype: torch.dtype, device: str, fp6: bool = False) -> dict[str, Callable[[], Case]]:
    """Returns, by name, what makes each op's case of those that a LLaMA or Qwen model calls, or MII; on ``device``."""
    made: dict[str, Callable[..., Case]] = {f"linear, {name}": partial(linear, name) for name in MATRICES}
    made |= {
        "rms_norm": norm,
        "rms_pre_norm": pre_norm,
        "gated_activation": gated,
        "bias_activation": biased,
        "bias_activation of none": unbiased,
        "ragged_embed": embed,
        "gather_for_logits": gather,
        "build_atoms": atoms,
        "kv_trained_rotary_embeddings": rotary,
        "kv_rotary_embeddings": mii_rotary,
        "flash_attn_by_atoms": attention,
    }
    if fp6:
        made["cuda_wf6af16_linear"] = fp6_linear
    return {name: partial(make, sizes=sizes, dtype=dtype, device=device) for name, make in made.items()}


MATRICES = ("query-key-value", "attention output", "gate-up", "down", "head")


def linear(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns a matrix product of a layer, or of the head."""
    query, key, _ = sizes.widths
    columns, depth = {
        "query-key-value": (query + 2 * key, sizes.hidden),
        "attention output": (sizes.hidden, query),
        "gate-up": (2 * sizes.inner, sizes.hidden),
        "down": (sizes.hidden, sizes.inner),
        "head": (sizes.vocab, sizes.hidden),
    }[name]
    hidden = normal(min(sizes.rows, 100), depth, dtype=dtype, device=device)
    weight = (normal(columns, depth, dtype=torch.float32, device=device, seed=9) * depth**-0.5).to(dtype)

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.create_handle()
        kernels.blas_linear(on["out"], on["hidden"], on["weight"])
        return on

    out = unset(len(hidden), columns, dtype=dtype, device=device)
    return Case({"hidden": hidden, "weight": weight, "out": out}, call, {"out": product(hidden, weight, dtype)})


def product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the exact product, and its bound.

    The result is rounded once; sums are float32. cuBLAS may keep the sums of parts of the depth in the type ("split-K",
    which its default math mode allows): each is about as large as the square root of the sum of the squared products.
    """
    one, other = hidden.double(), weight.double().T
    exact, spread = one @ other, one.abs() @ other.abs()
    parts = (one.square() @ other.square()).sqrt()
    u = unit(dtype)
    return exact, u * (exact.abs() + 4 * parts) + (one.shape[1] + 8) * SINGLE * spread + tiny(dtype)


def norm(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns RMSNorm: rounded three times, for the factor is."""

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.rms_norm(on["out"], on["values"], on["gamma"], 1e-5)
        return on

    values = normal(sizes.rows, sizes.hidden, dtype=dtype, device=device)
    tensors = {"values": values, **_norm_room(sizes, dtype, device)}
    return Case(tensors, call, {"out": _normed(values, tensors["gamma"], dtype)})


def pre_norm(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the residual's sum and its RMSNorm."""

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.rms_pre_norm(on["out"], on["sum"], on["values"], on["residual"], on["gamma"], 1e-5)
        return on

    values, residual = (normal(sizes.rows, sizes.hidden, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    total = values + residual  # rounded once, in every implementation
    tensors = {"values": values, "residual": residual, "sum": unset(*total.shape, dtype=dtype, device=device)}
    tensors |= _norm_room(sizes, dtype, device)
    exact = {"out": _normed(total, tensors["gamma"], dtype), "sum": (total.double(), torch.zeros_like(total).double())}
    return Case(tensors, call, exact)


def _norm_room(sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    gamma = normal(sizes.hidden, dtype=dtype, device=device, seed=2)
    return {"gamma": gamma, "out": unset(sizes.rows, sizes.hidden, dtype=dtype, device=device)}


def _normed(values: Tensor, gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = values.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma.double()
    return exact, (3.02 * unit(dtype) + (values.shape[1] + 8) * SINGLE) * exact.abs() + tiny(dtype)


def gated(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns SiLU times up, whose columns alternate; in float32, rounded once."""

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.gated_activation(on["out"], on["values"], None, SIGLU)
        return on

    values = 3 * normal(sizes.rows, 2 * sizes.inner, dtype=dtype, device=device)
    out = unset(sizes.rows, sizes.inner, dtype=dtype, device=device)
    gate, up = values[:, 0::2].double(), values[:, 1::2].double()
    exact = gate * gate.sigmoid() * up
    # expf is compiled with --use_fast_math: 2 + 1.2 |x| units of float32, and |x| is below 20.
    return Case(
        {"values": values, "out": out},
        call,
        {"out": (exact, (1.01 * unit(dtype) + 64 * SINGLE) * exact.abs() + tiny(dtype))},
    )


def biased(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the addition of a bias, in place, as of Qwen2's query, key and value."""

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.bias_activation(on["values"], on["bias"], IDENTITY)
        return on

    values = normal(sizes.rows, sum(sizes.widths), dtype=dtype, device=device)
    bias = normal(sum(sizes.widths), dtype=dtype, device=device, seed=1)
    exact = values.double() + bias.double()
    bound = 1.01 * unit(dtype) * exact.abs() + tiny(dtype)
    return Case({"values": values, "bias": bias}, call, {"values": (exact, bound)})


def unbiased(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the same without a bias, which is to leave all as it is."""

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.bias_activation(on["values"], None, IDENTITY)
        return on

    values = normal(sizes.rows, sizes.hidden, dtype=dtype, device=device)
    return Case({"values": values}, call, {"values": _as_it_is(values)})


def embed(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns rows of the embedding, the first and the last among them."""

    def call(kernels: Any, on: dict[str, Tensor], batch: Batch) -> Outputs:
        kernels.ragged_embed(on["out"], on["ids"], on["table"], None, 0, *batch.places)
        return on

    table = normal(sizes.vocab, sizes.hidden, dtype=dtype, device=device)
    ids = torch.randint(0, sizes.vocab, (sizes.rows,), generator=torch.Generator().manual_seed(0))
    ids[:2] = torch.tensor([0, sizes.vocab - 1])
    out = unset(sizes.rows, sizes.hidden, dtype=dtype, device=device)
    tensors = {"ids": ids.to(device), "table": table, "out": out}
    chunks = list(sizes.spans), [[0]] * len(sizes.spans), 0
    return Case(tensors, call, {"out": _as_it_is(table[ids.to(device)])}, chunks)


def gather(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the last row of each sequence."""

    def call(kernels: Any, on: dict[str, Tensor], batch: Batch) -> Outputs:
        kernels.gather_for_logits(on["out"], on["values"], batch.counts, batch.sequences)
        return on

    values = normal(sizes.rows, sizes.hidden, dtype=dtype, device=device)
    last = torch.tensor([length for _, length in sizes.spans]).cumsum(0) - 1
    out = unset(len(sizes.spans), sizes.hidden, dtype=dtype, device=device)
    chunks = list(sizes.spans), [[0]] * len(sizes.spans), 0
    return Case({"values": values, "out": out}, call, {"out": _as_it_is(values[last])}, chunks)


def atoms(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the attention atoms; addresses as places in the table of blocks, and not the unused number."""
    query_block, kv_block = block_sizes(sizes.head_dim, device)

    def call(kernels: Any, on: dict[str, Tensor], batch: Batch) -> Outputs:
        found = built_atoms(kernels, batch, query_block, kv_block).long()
        address = (found[:, 0] & 0xFFFFFFFF) | found[:, 1] << 32
        owner = (address[:, None] == batch.pointers.cpu()).long().argmax(1)
        assert torch.equal(batch.pointers.cpu()[owner], address), "an atom has no sequence's table"
        return {"atoms": torch.cat([owner[:, None], found[:, 2:7]], 1)}

    rows, begin = [], 0
    for uid, (start, length) in enumerate(sizes.spans):
        for first in range(0, length, query_block):
            taken = min(query_block, length - first)
            end = start + first + taken
            rows.append([uid, begin + first, taken, -(-end // kv_block), end, start + first])
        begin += length
    blocks = [[0] * -(-(start + length) // kv_block) for start, length in sizes.spans]
    exact = {"atoms": _as_it_is(torch.tensor(rows))}
    return Case({}, call, exact, (list(sizes.spans), blocks, 0))


def _ragged(sizes: Sizes, dtype: torch.dtype, device: str, spans: list[tuple[int, int]] | None = None) -> Ragged:
    _, kv_block = block_sizes(sizes.head_dim, device)
    group = sizes.heads // sizes.kv_heads
    shape = Shape(sizes.head_dim, group, sizes.kv_heads, kv_block, dtype, device)
    return Ragged(shape, spans or list(sizes.spans), 0)


def rotary(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the rotary embedding with given frequencies, and the copy of keys and values into the cache."""
    exponents = torch.arange(0, sizes.head_dim, 2, dtype=torch.float32, device=device) / sizes.head_dim
    frequencies = 10000.0**-exponents

    def turn(kernels: Any, on: dict[str, Tensor], parts: list[Tensor], batch: Batch) -> None:
        kernels.kv_trained_rotary_embeddings(on["cache"], *parts, on["frequencies"], *batch.places)

    return _turned(sizes, dtype, device, turn, (frequencies, frequencies), 0.0)


def mii_rotary(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns the same with the frequencies that DeepSpeed's own models, and so MII, have it compute.

    It rounds those of keys, and of each group's first query, to the type: positions are few, lest that be all.
    """
    exponents = torch.arange(0, sizes.head_dim, 2, dtype=torch.float32, device=device) / sizes.head_dim
    exact = 1.0 / 10000.0**exponents
    rounded = exact.to(dtype).float()
    group = sizes.heads // sizes.kv_heads
    of_query = torch.stack([exact if head % group else rounded for head in range(sizes.heads)])

    def turn(kernels: Any, on: dict[str, Tensor], parts: list[Tensor], batch: Batch) -> None:
        kernels.kv_rotary_embeddings(on["cache"], *parts, sizes.head_dim, 10000.0, *batch.places)

    few = [(0, 60), (3, 1), (20, 40)]
    # powf is compiled with --use_fast_math.
    return _turned(sizes, dtype, device, turn, (of_query, rounded), 2.0**-19, few)


def _turned(
    sizes: Sizes,
    dtype: torch.dtype,
    device: str,
    turn: Callable[[Any, dict[str, Tensor], list[Tensor], Batch], None],
    frequencies: tuple[Tensor, Tensor],
    off: float,
    spans: list[tuple[int, int]] | None = None,
) -> Case:
    """Returns a case of a rotary embedding; frequencies of queries and keys are off by a share of ``off`` at most.

    Angles are float32, and sine and cosine are compiled with --use_fast_math: their error grows with the angle.
    """
    ragged = _ragged(sizes, dtype, device, spans)
    positions = torch.cat([torch.arange(start, start + length) for start, length in ragged.spans]).to(device)
    tokens, size = len(positions), ragged.shape.block_size
    pairs = zip(ragged.spans, ragged.blocks, strict=True)
    held = [own[p // size] for (start, length), own in pairs for p in range(start, start + length)]
    block, place = torch.tensor(held, device=device), positions % size

    def call(kernels: Any, on: dict[str, Tensor], batch: Batch) -> Outputs:
        parts = list(on["qkv"].split(sizes.widths, 1))
        turn(kernels, on, parts, batch)
        where = block.to(on["qkv"].device), place.to(on["qkv"].device)
        written = on["cache"].isfinite().sum()[None]
        keys, values = (on["cache"][where[0], where[1], part] for part in (0, 1))
        return {"query": parts[0], "keys": keys, "values": values, "written": written}

    def exact(part: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        low, high = part.double().view(tokens, -1, sizes.head_dim).chunk(2, -1)
        angle = positions[:, None, None].double() * own.double().reshape(1, -1, sizes.head_dim // 2)
        turned = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)
        spread = (low.abs() + high.abs()).repeat(1, 1, 2)
        wrong = (angle * (2.0**-22 + off) + 2.0**-20).expand_as(low).repeat(1, 1, 2)
        return turned, unit(dtype) * turned.abs() + wrong * spread + tiny(dtype)

    query, key, value = ragged.qkv.split(sizes.widths, 1)
    of_query, of_key = (exact(part, own) for part, own in zip((query, key), frequencies, strict=True))
    cache = unset(len(ragged.keys), size, 2, sizes.kv_heads, sizes.head_dim, dtype=dtype, device=device)
    return Case(
        {"qkv": ragged.qkv, "cache": cache, "frequencies": frequencies[1]},
        call,
        {
            "query": (of_query[0].flatten(1), of_query[1].flatten(1)),
            "keys": of_key,
            "values": _as_it_is(value.view(tokens, -1, sizes.head_dim)),
            "written": _as_it_is(torch.tensor([2 * tokens * sizes.widths[1]], device=device)),
        },
        (ragged.spans, ragged.blocks, ragged.other),
    )


def attention(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns attention by atoms; blocks of others are NaN, and what others left in a last block is loud."""
    ragged = _ragged(sizes, dtype, device)
    blocks = block_sizes(sizes.head_dim, device)

    def call(kernels: Any, on: dict[str, Tensor], batch: Batch) -> Outputs:
        made = built_atoms(kernels, batch, *blocks).to(on["qkv"].device)
        query = on["qkv"][:, : sizes.widths[0]]
        keys, values = on["cache"].unbind(2)
        kernels.flash_attn_by_atoms(on["out"], query, keys, values, made, ragged.scale, True)
        return on

    cache = torch.stack(ragged.loud(), 1).permute(0, 3, 1, 2, 4).contiguous()
    out = unset(sizes.rows, sizes.widths[0], dtype=dtype, device=device)
    exact = {"out": (ragged.expected.flatten(1), ragged.bound().flatten(1))}
    tensors = {"qkv": ragged.qkv, "cache": cache, "out": out}
    return Case(tensors, call, exact, (ragged.spans, ragged.blocks, ragged.other))


def fp6_linear(sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    """Returns a product with weights that FP6 holds exactly, times a scale a row."""
    rows, columns = max(256, sizes.hidden // 256 * 256), sizes.hidden
    pick = torch.Generator().manual_seed(0)
    mantissa = torch.randint(4, 8, (rows, columns), generator=pick)
    exponent = torch.randint(-2, 5, (rows, columns), generator=pick)
    sign = torch.randint(0, 2, (rows, columns), generator=pick) * 2 - 1
    weight = (sign * mantissa / 4.0 * 2.0**exponent).half()  # 3 bits of exponent, 2 of mantissa
    scales = (torch.rand(rows, generator=pick) * 1e-2 + 1e-3).half()
    hidden = normal(64, columns, dtype=torch.float16, device=device)

    def call(kernels: Any, on: dict[str, Tensor], batch: None) -> Outputs:
        kernels.create_handle()
        low, high = (part.to(on["hidden"].device) for part in kernels.preprocess_weight(on["weight"].cpu()))
        room = torch.empty(1, rows, 64, dtype=torch.float32, device=on["hidden"].device)
        kernels.cuda_wf6af16_linear(on["out"], on["hidden"], low, high, on["scales"], room, rows, 64, columns, 1)
        return on

    out = unset(64, rows, dtype=torch.float16, device=device)
    tensors = {"hidden": hidden, "weight": weight, "scales": scales.to(device), "out": out}
    scaled = weight.double().to(device) * scales.double().to(device)[:, None]
    return Case(tensors, call, {"out": product(hidden, scaled, torch.float16)})


def _as_it_is(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values that no implementation may change at all."""
    return values.double(), torch.zeros_like(values, dtype=torch.float64)
