"""Where tests run Triton's kernels: on a GPU, or on the CPU by Triton's interpreter.

Triton asks for the interpreter when it is imported and when it meets a kernel, and DeepSpeed imports it too: so
conftest.py asks first. It is not left in the environment, which the runs that tests start inherit.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any
from unittest import mock

from harness.machine import device

DEVICE = device.accelerator()


def interpret() -> None:
    """Has kernels that this process imports from now on interpreted, where there is no GPU."""
    if DEVICE != "cpu" or importlib.util.find_spec("triton") is None:
        return
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton
        from triton.runtime import interpreter

        triton.knobs.runtime.interpret = True  # remembered; this sets the variable as well, and here it goes again
    _round_to_nearest(interpreter)
    _count_with_one(interpreter)
    _patch_once(interpreter)
    _know_types(interpreter)
    _know_shapes()


def _round_to_nearest(interpreter: Any) -> None:
    """Rounds float32 to bfloat16 as a GPU does: the interpreter of 3.9 cuts off instead, which is twice as far off."""
    import numpy as np
    import triton.language as tl

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = source.data.view(np.uint32)
        near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        upper = np.where(np.isnan(source.data), bits >> np.uint32(16) | np.uint32(0x40), near)
        return interpreter.TensorHandle(upper.astype(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = rounded


def _count_with_one(interpreter: Any) -> None:
    """Takes an array of one number for that number, as the interpreter of 3.6 does where NumPy is older than 2.4."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def _patch_once(interpreter: Any) -> None:
    """Leaves what is patched: half of the time goes into patching Triton's language anew at every function's call."""
    import triton.language as tl

    patch = interpreter._patch_lang

    def patched(function: Any) -> bool:
        # A function is patched through those of the two modules that its own knows.
        known = [one for one in (tl, tl.core) if any(value is one for value in function.__globals__.values())]
        return all(one.__module__ == interpreter.__name__ for one in (tl.core.reduce, *(each.load for each in known)))

    interpreter._patch_lang = lambda function: None if patched(function) else patch(function)


def _know_types(interpreter: Any) -> None:
    """Remembers NumPy's type for each of Triton's, of all of which a table is made anew for every operation."""
    import triton.language as tl

    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def remembered(kind: Any) -> Any:
        name = "pointer" if isinstance(kind.scalar, tl.pointer_type) else kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    interpreter._get_np_dtype = remembered


def _know_shapes() -> None:
    """Remembers what follows from a block's shape, which is worked out anew for every value and every comparison."""
    import triton.language as tl

    make_type, make_value = tl.block_type.__init__, tl.tensor.__init__
    of_types: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_values: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def typed(self: Any, element_ty: Any, shape: Any) -> None:
        self.sizes = tuple(getattr(size, "value", size) for size in shape)
        if self.sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[self.sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = of_types[self.sizes]
        self.name = f"<{text}, {element_ty}>"

    def valued(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if type.is_block() else ()
        if sizes not in of_values:
            make_value(self, handle, type)
            of_values[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_values[sizes]

    def same(self: Any, other: Any) -> bool:
        if not isinstance(other, tl.block_type):
            return False
        return self.sizes == other.sizes and self.element_ty == other.element_ty

    tl.block_type.__init__, tl.tensor.__init__, tl.block_type.__eq__ = typed, valued, same
