"""Packed and widened linear layers compute what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.engines.shared.packed_linear import (
    PIECE_BYTES,
    WIDE,
    PackedLinear,
    WidenedLinear,
    can_pack,
    pack_linears,
)
from harness.machine.device import has_bfloat16_kernels

needs_kernels = pytest.mark.skipif(not has_bfloat16_kernels(), reason="this machine has no bfloat16 kernels")


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 200])
def test_packed_equals_plain(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = linear(inputs)
        got = PackedLinear(linear)(inputs)
    assert got.shape == expected.shape
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 200])
@pytest.mark.parametrize("out", [40, 1_000])  # in one piece, in several of which the last is smaller
def test_widened_is_float32_rounded_once(rows: int, bias: bool, out: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4_096, out, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(1, rows, 4_096, dtype=torch.bfloat16)
    widened = WidenedLinear(linear)
    assert widened.step * 4_096 * 4 == PIECE_BYTES and (out > widened.step) == (out == 1_000)
    with torch.inference_mode():
        got = widened(inputs)
        exact = nn.functional.linear(inputs.float(), linear.weight.float(), linear.bias.float() if bias else None)
        plain = linear(inputs)
    assert (got.shape, got.dtype) == (plain.shape, torch.bfloat16)
    torch.testing.assert_close(got.float(), exact, atol=1e-2, rtol=2**-8)
    if rows >= 8:
        assert (got - exact).abs().mean() <= (plain - exact).abs().mean() * 1.01


def test_every_linear_of_a_model_is_packed_and_nothing_else() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 8),
            "layers": nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8)),
            "special": Scaled(8, 8),
        }
    )
    assert pack_linears(model) == 1
    assert isinstance(model["layers"][0], PackedLinear if has_bfloat16_kernels() else WidenedLinear)
    assert isinstance(model["special"], Scaled)


def test_of_float32_a_head_alone_is_packed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, WIDE))
    inputs = torch.randn(3, 24)
    with torch.inference_mode():
        expected = model(inputs)
        assert pack_linears(model) == 1
        assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]
        torch.testing.assert_close(model(inputs), expected)


def test_what_is_packed_is_on_a_cpu() -> None:
    assert can_pack(torch.device("cpu"), torch.bfloat16) and can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("cpu"), torch.float16)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
