"""The Triton kernels on a GPU, in real sizes; in small ones test_triton_kernels.py runs there too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from support import kernel_checks
from support.attention import Ragged, Shape

from harness.engines.fastgen.runners.triton.kernels.attention import attention_kernel, splits_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")]
HEADS = {"7B": (1, 4), "70B over 8 ranks": (8, 1), "Llama-3 8B": (4, 8), "Qwen2-7B": (7, 4)}  # group, key-value heads
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
LONG = [(3000, 1), (17, 1), (0, 1), (1, 1), (0, 700), (513, 300), (1024, 1), (2047, 1), (0, 15), (4095, 1)]


@DTYPES
@pytest.mark.parametrize("heads", HEADS)
def test_attention_of_long_sequences(heads: str, dtype: torch.dtype) -> None:
    ragged = Ragged(Shape(128, *HEADS[heads], 64, dtype, DEVICE), LONG, 0)
    for splits in (1, 4, 16):
        ragged.check(splits)
    ragged.check_torch()


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96])
def test_attention_of_other_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    ragged = Ragged(Shape(head_dim, 3, 2, 32, dtype, DEVICE), LONG, 0)
    ragged.check(2)
    ragged.check_torch()


@DTYPES
def test_the_kernels_between_at_llama_sizes(dtype: torch.dtype) -> None:
    kernel_checks.norm(8192, True, dtype, DEVICE, 300)
    kernel_checks.rotary(32, 8, 128, True, dtype, DEVICE, 300, 64, 4096)
    kernel_checks.silu(11008, dtype, DEVICE, 300)
    kernel_checks.embedding(4096, 32000, dtype, DEVICE, 300)
    kernel_checks.best(32000, dtype, DEVICE, 300)
    kernel_checks.best_of_ranks(8, DEVICE)


def test_the_same_pass_gives_the_same_bits() -> None:
    ragged = Ragged(Shape(128, 8, 1, 64, torch.bfloat16, DEVICE), LONG * 4, 0)
    splits = splits_for(28, 1, 4096, torch.cuda.get_device_properties(0).multi_processor_count)
    assert splits > 1
    ragged.check_repeats(splits)


def test_figures_may_begin_anywhere_in_a_buffer() -> None:
    """Nothing is compiled anew when they move: that would be seconds inside the clock."""
    ragged = Ragged(Shape(128, 4, 2, 64, torch.bfloat16, DEVICE), LONG, 0)
    first = ragged.attended()
    compiled = len(attention_kernel.device_caches[torch.cuda.current_device()][0])
    moved = {}
    for field in dataclasses.fields(ragged.chunks):
        figure = getattr(ragged.chunks, field.name)
        moved[field.name] = torch.cat([figure.flatten()[:1], figure.flatten()])[1:].view(figure.shape)
    ragged.chunks = dataclasses.replace(ragged.chunks, **moved)
    assert torch.equal(first, ragged.attended())
    assert len(attention_kernel.device_caches[torch.cuda.current_device()][0]) == compiled


def test_a_graph_of_it_gives_what_launching_it_gives() -> None:
    Ragged(Shape(128, 8, 1, 64, torch.bfloat16, DEVICE), LONG, 0).check_graph(4)
