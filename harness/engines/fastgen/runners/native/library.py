"""The compiled library's functions and structures, as ``model.cpp`` declares them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

WIDTH = 16  # widths and blocks are multiples of it
LINE = 16  # words in a line of the processor's cache
LONGEST_BLOCK = 256  # tokens
LARGEST_HEAD = 256
# Of a pass, in model.cpp's order.
STAGES = ("embedding", "norms", "query, key, value", "rotary, cache", "attention", "output", "gate, up", "down", "head")


class Layer(ctypes.Structure):
    """``HarnessLayer``: addresses of a layer's packed weights (uint32 words), vectors (float32) and cache."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            *("qkv", "output", "gate_up", "down"),
            *("qkv_bias", "output_bias"),
            *("attention_norm", "mlp_norm"),
            *("attended_norm", "mlp_out_norm"),
            *("query_norm", "key_norm"),
            *("keys", "values"),
        )
    ]


class Model(ctypes.Structure):
    """``HarnessModel``."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("layer_count", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab"),
                *("block_size", "norms_all_heads", "gelu"),
            )
        ),
        *((name, c_float) for name in ("epsilon", "scaling", "embedding_scale", "residual_scale")),
        *((name, c_void_p) for name in ("embedding", "norm", "head", "cosines", "sines")),
        ("layers", POINTER(Layer)),
    ]


class Pass(ctypes.Structure):
    """``HarnessPass``."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "chunks", "rows")),
        *(
            (name, c_void_p)
            for name in (
                *("token_ids", "starts", "lengths", "blocks", "block_begins", "sampled"),
                *("next_ids", "logits"),
            )
        ),
    ]


def load(path: Path) -> ctypes.CDLL:
    """Returns the library with its functions' types set; raises OSError when it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    library.harness_panel.argtypes = []
    library.harness_panel.restype = c_int32
    library.harness_pack.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int32]
    library.harness_pack.restype = None
    library.harness_new.argtypes = [c_int32]
    library.harness_new.restype = c_void_p
    library.harness_touch.argtypes = [POINTER(Model), c_int64, c_int32]
    library.harness_touch.restype = None
    library.harness_stages.argtypes = [c_void_p]
    library.harness_stages.restype = POINTER(c_double)
    library.harness_delete.argtypes = [c_void_p]
    library.harness_delete.restype = None
    library.harness_forward.argtypes = [c_void_p, POINTER(Model), POINTER(Pass), c_int32]
    library.harness_forward.restype = c_int32
    return library
