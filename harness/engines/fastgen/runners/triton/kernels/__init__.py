"""The kernels between the matrix products. Each has a function that takes tensors and launches it once."""

from typing import Any

# Said at every launch: products and sums in one instruction. Triton's default for it changes between versions.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
