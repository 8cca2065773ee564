"""Which kernels compute the passes: decided here, for the early check and for the rank. Imports no torch by itself.

``engine.kernels=auto`` takes DeepSpeed's on CUDA and the native ones on a CPU where they compute the model rightly,
else PyTorch's; kernels that were asked for and cannot are refused.
"""

from __future__ import annotations

from harness.basics.errors import UserError
from harness.engines.base import EngineSettings
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners.base import Runner
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.known_model import KnownModel
from harness.engines.shared import ragged_kernels
from harness.engines.shared.auto_tp_families import check_auto_tp

OTHERS = "use engine.kernels=torch or auto"


def check(engine: FastGenConfig, known: KnownModel, accelerator: str) -> None:
    """Refuses kernels that cannot compute the model, as far as its config alone says so.

    Raises:
        UserError: the kernels asked for cannot; or AutoTP, with which PyTorch's shard, is not known to.
    """
    ragged = accelerator == "cuda" and engine.kernels is not Kernels.torch
    reason = ragged_kernels.unsupported(known, engine.quantization) if ragged else None
    if reason is not None and engine.kernels is Kernels.deepspeed and known.architecture:
        raise _refused("deepspeed", reason)
    if not ragged or reason is not None:
        check_auto_tp(known.tp, known.architecture.get("model_type"))
    if engine.kernels is Kernels.native and known.architecture:
        reason = native_checks.unsupported(known)
        if reason is not None:
            raise _refused("native", reason)


def choose(settings: EngineSettings[FastGenConfig]) -> tuple[Runner, str | None]:
    """Returns the fastest kernels that can run, or the ones asked for; and a note where ``auto`` had to do without.

    Raises:
        UserError: those asked for cannot run here.
    """
    if settings.engine.kernels is Kernels.torch:
        return _torch(settings), None
    known = KnownModel.of(settings.source, settings.dtype, settings.tp, settings.max_context)
    if settings.device.startswith("cuda"):
        return _on_cuda(settings, known)
    return _on_cpu(settings, known)


def _on_cuda(settings: EngineSettings[FastGenConfig], known: KnownModel) -> tuple[Runner, str | None]:
    """Returns DeepSpeed's kernels, or PyTorch's."""
    import torch

    engine = settings.engine
    major = torch.cuda.get_device_capability(settings.device)[0]
    reason = (
        ragged_kernels.unsupported(known, engine.quantization)
        or ragged_kernels.not_installed(engine.quantization)
        or ragged_kernels.device_unsupported(engine.quantization, major)
    )
    if reason is None:
        from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner

        return DeepSpeedRunner(settings), None
    if engine.quantization is not None:
        raise UserError("engine.quantization", f"{engine.quantization}: {reason}", "use engine.quantization=null")
    if engine.kernels is Kernels.deepspeed:
        raise _refused("deepspeed", reason)
    return _torch(settings), _note("DeepSpeed's", reason)


def _on_cpu(settings: EngineSettings[FastGenConfig], known: KnownModel) -> tuple[Runner, str | None]:
    """Returns the C++ pass, or PyTorch's kernels."""
    from harness.engines.fastgen.runners.native.build import BuildError
    from harness.engines.fastgen.runners.native_runner import NativeRunner

    auto = settings.engine.kernels is Kernels.auto
    reason = native_checks.unsupported(known) or (native_checks.slower(settings.dtype) if auto else None)
    if reason is None:
        try:
            return NativeRunner(settings), None
        except BuildError as error:
            reason = str(error)
    if not auto:
        raise _refused("native", reason)
    return _torch(settings), _note("the native", reason)


def _torch(settings: EngineSettings[FastGenConfig]) -> Runner:
    from harness.engines.fastgen.runners.torch_runner import TorchRunner

    return TorchRunner(settings)


def _note(others: str, reason: str) -> str:
    return f"engine.kernels=auto took torch, not {others} kernels: {reason}"


def _refused(kernels: str, reason: str) -> UserError:
    return UserError("engine.kernels", f"{kernels}: {reason}", OTHERS)
