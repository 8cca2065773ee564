"""DeepSpeed's ragged CUDA kernels in torch, so that all the rest of its engine runs in tests on a CPU.

Each function computes what the source of the kernel says, in deepspeed/inference/v2/kernels and ragged/csrc:
reductions in float32, results rounded to the tensors' type, blocks found through the addresses of their tables.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
Patch = Callable[[object, str, object], None]


class Kernels:
    """The functions of ``inference_core_ops``, ``ragged_device_ops`` and ``ragged_ops`` that the models call."""

    @staticmethod
    def create_handle() -> None:
        pass

    @staticmethod
    def preprocess_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Stands in for packing FP6 values into their 2-bit and 4-bit parts: keeps them as they come."""
        assert weight.dtype is torch.float16 and weight.is_contiguous() and weight.device == CPU
        return weight.view(torch.uint8).flatten(), torch.zeros(1, dtype=torch.uint8)

    @staticmethod
    def cuda_wf6af16_linear(
        output: Tensor, hidden: Tensor, low: Tensor, high: Tensor, scales: Tensor, workspace: Tensor, *sizes: int
    ) -> None:
        rows, tokens, columns, _ = sizes
        assert output.shape == (tokens, rows)
        weight = low.view(torch.float16).reshape(rows, columns).float() * scales.float().reshape(rows, 1)
        output.copy_(hidden.float() @ weight.T)

    @staticmethod
    def allocate_fast_host_buffer(mirror: Tensor) -> Tensor:
        return torch.empty_like(mirror)

    @staticmethod
    def blas_linear(output: Tensor, hidden: Tensor, weights: Tensor) -> None:
        assert output.dtype == hidden.dtype == weights.dtype and output.shape[1] == weights.shape[0]
        output.copy_(hidden.float() @ weights.float().T)

    @staticmethod
    def rms_norm(output: Tensor, values: Tensor, gamma: Tensor, epsilon: float) -> None:
        scale = torch.rsqrt(values.float().square().mean(-1, keepdim=True) + epsilon).to(values.dtype)
        output.copy_(values * scale * gamma)

    @staticmethod
    def rms_pre_norm(
        output: Tensor, residual_output: Tensor, values: Tensor, residual: Tensor, gamma: Tensor, epsilon: float
    ) -> None:
        residual_output.copy_(values + residual)
        Kernels.rms_norm(output, residual_output, gamma, epsilon)

    @staticmethod
    def gated_activation(output: Tensor, values: Tensor, bias: Tensor | None, kind: int) -> None:
        assert kind == 5 and bias is None  # SiGLU; gate and value in adjacent columns
        gate, value = values[:, 0::2].float(), values[:, 1::2].float()
        output.copy_(value * torch.nn.functional.silu(gate))

    @staticmethod
    def bias_activation(values: Tensor, bias: Tensor | None, kind: int) -> None:
        assert kind == 6  # identity
        if bias is not None:
            assert bias.dtype == values.dtype
            values.add_(bias)

    @staticmethod
    def ragged_embed(output: Tensor, ids: Tensor, table: Tensor, positions: Tensor | None, *others: Any) -> None:
        assert positions is None and int(ids.min()) >= 0 and int(ids.max()) < len(table)
        output.copy_(table[ids])

    @staticmethod
    def gather_for_logits(output: Tensor, values: Tensor, batch: Tensor, sequences: Tensor) -> None:
        last = sequences[: int(batch[1])]
        output.copy_(values[last[:, 0] + last[:, 1] - 1])

    @staticmethod
    def build_atoms(
        atoms: Tensor, batch: Tensor, sequences: Tensor, tables: Tensor, query_block: int, kv_block: int
    ) -> int:
        count = 0
        for (start, length, seen, _), table in zip(
            sequences[: int(batch[1])].tolist(), tables[: int(batch[1])].tolist(), strict=True
        ):
            for offset in range(0, length, query_block):
                taken = min(query_block, length - offset)
                extent = seen + offset + taken
                row = [*_halves(table), start + offset, taken, -(-extent // kv_block), extent, seen + offset, 0]
                atoms[count] = torch.tensor(row, dtype=torch.int32)  # IndexError where C++ writes past the end
                count += 1
        return count

    @staticmethod
    def kv_rotary_embeddings(
        cache: Tensor, query: Tensor, key: Tensor, value: Tensor, dim: int, base: float, *places: Tensor
    ) -> None:
        """Rounds the frequencies of the keys, and of the first query of each of their groups only."""
        exact = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        rounded = exact.to(query.dtype).float()
        head_dim = cache.shape[4]
        ratio = query.shape[1] // head_dim // cache.shape[3]
        of_query = torch.stack([exact if head % ratio else rounded for head in range(query.shape[1] // head_dim)])
        _rotate_and_store(cache, query, key, value, of_query, rounded, *places)

    @staticmethod
    def kv_trained_rotary_embeddings(
        cache: Tensor, query: Tensor, key: Tensor, value: Tensor, frequencies: Tensor, *places: Tensor
    ) -> None:
        assert frequencies.dtype == torch.float32 and frequencies.is_contiguous()
        _rotate_and_store(cache, query, key, value, frequencies, frequencies, *places)

    @staticmethod
    def flash_attn_by_atoms(
        output: Tensor, query: Tensor, keys: Tensor, values: Tensor, atoms: Tensor, scale: float, causal: bool
    ) -> None:
        assert causal
        heads, head_dim = keys.shape[2:]
        for row in atoms.tolist():
            start, length, kv_blocks, extent, position, _ = row[2:]
            blocks = _table(_pointer(row[0], row[1]), kv_blocks)
            k, v = (part[blocks].reshape(-1, heads, head_dim)[:extent].float() for part in (keys, values))
            q = query[start : start + length].reshape(length, heads, -1, head_dim).float()
            scores = torch.einsum("qhrd,khd->hrqk", q, k) * scale
            hidden = torch.arange(extent) > torch.arange(position, position + length)[:, None]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            output[start : start + length] = torch.einsum("hrqk,khd->qhrd", weights, v).reshape(length, -1).to(q.dtype)


def _rotate_and_store(
    cache: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    batch: Tensor,
    sequences: Tensor,
    token_sequences: Tensor,
    tables: Tensor,
) -> None:
    count, block_size, _, kv_heads, head_dim = cache.shape
    tokens = int(batch[0])
    owner = sequences[token_sequences[:tokens].long()]
    positions = owner[:, 2] + torch.arange(tokens) - owner[:, 0]

    def rotated(rows: Tensor, frequencies: Tensor) -> Tensor:
        values = rows.reshape(tokens, -1, head_dim).float()
        angles = positions[:, None, None].float() * frequencies.reshape(1, -1, head_dim // 2)
        low, high = values.chunk(2, dim=-1)
        return torch.cat(
            [low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], dim=-1
        ).to(rows.dtype)

    query.copy_(rotated(query, of_query).reshape(query.shape))
    keys, values = rotated(key, of_key), value.reshape(tokens, kv_heads, head_dim)
    pointers = tables[token_sequences[:tokens].long()].tolist()
    for token, (pointer, position) in enumerate(zip(pointers, positions.tolist(), strict=True)):
        block = _table(pointer, position // block_size + 1)[-1]
        assert 0 <= block < count
        cache[block, position % block_size, 0] = keys[token]
        cache[block, position % block_size, 1] = values[token]


def _table(pointer: int, length: int) -> list[int]:
    """Reads a sequence's table of blocks, which the kernels get as an address."""
    return list((ctypes.c_int32 * length).from_address(pointer))


def _halves(pointer: int) -> tuple[int, int]:
    low, high = (ctypes.c_int32(part).value for part in (pointer & 0xFFFFFFFF, pointer >> 32))
    return low, high


def _pointer(low: int, high: int) -> int:
    return (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32


def emulate(patch: Patch) -> None:
    """Puts `Kernels` in place of the compiled extensions, and the CPU in place of the current CUDA device."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.inference.v2.ragged.blocked_allocator import BlockedAllocator
    from deepspeed.ops.op_builder import InferenceCoreBuilder, RaggedOpsBuilder, RaggedUtilsBuilder

    def unpinned(self: Any, blocks: int) -> None:
        self._num_blocks = self._free_blocks = blocks
        self._blocks = torch.arange(1, blocks + 1, dtype=torch.int32)
        self._head = 0

    for builder in (InferenceCoreBuilder, RaggedOpsBuilder, RaggedUtilsBuilder):
        patch(builder, "load", lambda self, *_: Kernels)
    patch(BlockedAllocator, "__init__", unpinned)
    patch(get_accelerator(), "current_device", lambda: "cpu")
    patch(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
