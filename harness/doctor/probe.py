"""A process of its own that imports the heavy packages and tries the GPUs: ``python -m harness.doctor.probe NAME ...``.

It writes a JSON line for each thing that it has tried, so that whatever ends it is known by the last one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from harness.basics.errors import one_line
from harness.machine.device import accelerator

PRODUCT = 256  # rows and columns of the product that a GPU is tried with


def main(names: list[str]) -> int:
    """Imports the packages in their order, then tries what needs them; returns the exit status."""
    out = own_output()
    for name in names:
        say(out, {"import": name})
        say(out, {"package": name} | _imported(name))
    if "torch" in sys.modules:
        for entry in _extensions():
            say(out, entry)
        for entry in _devices():
            say(out, entry)
    return 0


def own_output() -> TextIO:
    """Returns standard output for our lines alone: what libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def say(out: TextIO, entry: dict[str, Any]) -> None:
    """Writes a line, at once."""
    out.write(json.dumps(entry) + "\n")
    out.flush()


def _imported(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return {"error": one_line(f"{type(error).__name__}: {error}", 300)}
    return {"error": None, "version": str(getattr(module, "__version__", "")).strip()}


def _extensions() -> Iterator[dict[str, Any]]:
    """Yields where torch builds extensions, and on CUDA what is there of DeepSpeed's."""
    from torch.utils.cpp_extension import get_default_build_root

    from harness.engines.shared import deepspeed_ops

    yield {"extensions": os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()}
    if accelerator() != "cuda" or "deepspeed" not in sys.modules:
        return
    for name in deepspeed_ops.BUILDERS:
        try:
            builder = deepspeed_ops.builder_of(name)
            entry: dict[str, Any] = {"built": deepspeed_ops.built(name), "folder": str(deepspeed_ops.folder(name))}
            if not entry["built"]:
                entry |= _buildable(name, builder)
        except Exception as error:  # torch's, DeepSpeed's, the file system's
            entry = {"error": one_line(f"{type(error).__name__}: {error}", 300)}
        yield {"extension": name} | entry


def _buildable(name: str, builder: Any) -> dict[str, Any]:
    """Returns what DeepSpeed itself says before it compiles: whether it would, and its complaint."""
    import torch
    from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch

    try:
        if torch.version.cuda is not None:
            assert_no_cuda_mismatch(name)
        able = bool(builder.is_compatible(verbose=True))
    except Exception as error:
        return {"compatible": False, "complaint": one_line(str(error), 300)}
    return {"compatible": able, "complaint": one_line(str(getattr(builder, "error_log", None) or ""), 300)}


def _devices() -> Iterator[dict[str, Any]]:
    """Yields, for each GPU that torch sees, whether it computes."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        if accelerator() == "cuda":
            yield {"device": None, "error": "this build of torch is for CPUs alone"}
        return
    try:
        count = torch.cuda.device_count()
    except Exception as error:
        yield {"device": None, "error": one_line(str(error), 300)}
        return
    if not count:
        yield {"device": None, "error": "torch sees no GPU"}
    for number in range(count):
        try:
            ones = torch.ones(PRODUCT, PRODUCT, device=f"cuda:{number}", dtype=torch.bfloat16)
            right = bool(((ones @ ones) == PRODUCT).all())
            free, whole = torch.cuda.mem_get_info(number)
            yield {"device": number, "error": None if right else "a product is wrong", "free": free, "whole": whole}
        except Exception as error:
            yield {"device": number, "error": one_line(str(error), 300)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
