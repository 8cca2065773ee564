"""Made-up (dummy) weights of the plain families: a function of a weight's name and place alone.

So they are the same numbers on every device, in every type but for its rounding, and in any part of a weight: a rank
draws its own slices of a model, of which no machine holds the whole.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

DEVIATION = 0.02  # small enough for activations to stay finite in half precision
PIECE = 1 << 20  # elements drawn at a time: eight times as many bytes of room, and a few of them


def draw(name: str, to: Tensor, shape: tuple[int, ...], dim: int = 0, begin: int = 0, seed: int = 0) -> None:
    """Fills ``to`` with a part of the weight ``name``: uniform numbers about 0; norms are 1, biases 0.

    Args:
        to: of the weight's shape, except along ``dim``, where it may be shorter.
        shape: the whole weight's.
        begin: where along ``dim`` the part starts.
        seed: other weights for another one.
    """
    if len(shape) == 1:
        to.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    height, width = to.shape
    first_row, first_column = (begin, 0) if dim == 0 else (0, begin)
    start = zlib.crc32(f"{seed} {name}".encode())
    columns = torch.arange(first_column, first_column + width, device=to.device)
    step = max(1, PIECE // width)
    for row in range(0, height, step):
        rows = torch.arange(first_row + row, first_row + min(row + step, height), device=to.device)
        to[row : row + step] = _uniform(rows[:, None] * shape[1] + columns, start)


def _uniform(number: Tensor, start: int) -> Tensor:
    """Returns float32 numbers that look random for int64 ``number``, which is overwritten.

    Mixing as in C. Wellons' "lowbias32", in 64 bits of which the lower 32 count.
    """
    number.mul_(0x9E3779B1).bitwise_xor_(start).bitwise_and_(0xFFFFFFFF)
    number.bitwise_xor_(number >> 16).mul_(0x7FEB352D).bitwise_and_(0xFFFFFFFF)
    number.bitwise_xor_(number >> 15).mul_(0x846CA68B).bitwise_and_(0xFFFFFFFF)
    number.bitwise_xor_(number >> 16)
    highest = 2**24 - 1  # what float32 holds exactly
    return ((number >> 8).float() - highest / 2) * (DEVIATION * 12**0.5 / highest)
