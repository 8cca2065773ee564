"""DeepSpeed's CUDA extensions, which it compiles when first used: built here, ahead of what would wait for them.

DeepSpeed compiles for the devices that a process sees; here it is for all of the host's, so that a run on one of them
has no need to compile again. ``TORCH_CUDA_ARCH_LIST``, where it is set, decides.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.basics.errors import one_line, printable
from harness.basics.programs import beside_the_interpreter
from harness.machine import build_locks
from harness.machine.device import compute_capabilities

# By their names, what builds them in deepspeed.ops.op_builder.
BUILDERS = {
    "ragged_device_ops": "RaggedOpsBuilder",
    "ragged_ops": "RaggedUtilsBuilder",
    "inference_core_ops": "InferenceCoreBuilder",
    "transformer_inference": "InferenceBuilder",
}
RAGGED = ("ragged_device_ops", "ragged_ops", "inference_core_ops")
INJECTED = ("transformer_inference",)
AHEAD = "python launch/build_kernels.py"
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
OLDEST = 8.0  # compute capability


class OpsError(Exception):
    """An extension cannot be built or loaded; the message says why, in a line."""


def load(names: Sequence[str], aloud: bool = True) -> None:
    """Builds the extensions where that was never done, and loads them; DeepSpeed then finds them loaded.

    Args:
        aloud: whether to print what is waited for, minutes perhaps; one rank of a model is enough.

    Raises:
        OpsError: a compiler, a header or a device is missing, or does not do.
    """
    beside_the_interpreter()
    # One card below 8.0, a display's perhaps, would have all of it compiled without bfloat16.
    able = [capability for capability in compute_capabilities() if float(capability) >= OLDEST]
    if able:
        os.environ.setdefault(ARCHITECTURES, ";".join(able))
    if ARCHITECTURES in os.environ:
        os.environ[ARCHITECTURES] = plain_architectures(os.environ[ARCHITECTURES])
    for name in names:
        try:
            _load(name, _say if aloud else _nothing)
        except Exception as error:  # torch, DeepSpeed, the compiler and the dynamic linker have their own
            raise OpsError(f"{name}: {_reason(error)}") from error


def plain_architectures(listed: str) -> str:
    """Returns architectures as DeepSpeed can read them: of ``9.0a``, which GPU images set, it knows 9.0 alone.

    Its ``op_builder/builder.py`` takes both parts as whole numbers. None of its kernels uses what the letter adds.
    """
    return re.sub(r"(?<=\d)[af](?=\+|;|\s|$)", "", listed)


def _load(name: str, say: Callable[[str], None]) -> None:
    builder, place = builder_of(name), folder(name)
    build_locks.wait(place, say)
    if not built(name):
        say(f"compiling DeepSpeed's {name}, once: minutes ({AHEAD} does it ahead)")
    build_locks.own(place)
    builder.load(False)


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _nothing(line: str) -> None:
    return


def builder_of(name: str) -> Any:
    """Returns what builds an extension."""
    return getattr(importlib.import_module("deepspeed.ops.op_builder"), BUILDERS[name])()


def folder(name: str) -> Path:
    """Returns where torch builds an extension, made if it is not there."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))


def built(name: str) -> bool:
    """Whether the extension was compiled before, here or as DeepSpeed was installed."""
    if (folder(name) / f"{name}.so").exists():  # asked first: DeepSpeed takes seconds to import
        return True
    with contextlib.suppress(ImportError):
        from deepspeed.git_version_info import installed_ops

        return bool(installed_ops.get(name, False))
    return False


def compiled(name: str) -> tuple[int, int]:
    """Returns how many source files of an extension are compiled, and of how many."""
    count = len(builder_of(name).sources())
    return min(count, len(list(folder(name).glob("*.o")))), count


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return one_line(next((line for line in lines if "error:" in line), lines[0]), 300)
