"""Which kernels compute the passes: decided here, for the early check and for the rank. Imports no torch by itself.

``engine.kernels=auto`` takes the first of :data:`ORDER` that compute the model rightly and can be had on this machine;
kernels that were asked for and cannot are refused.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.basics.errors import UserError, one_line
from harness.engines.base import EngineSettings
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners.base import Runner
from harness.engines.fastgen.runners.native import build
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.engines.fastgen.runners.native.build import BuildError
from harness.engines.fastgen.runners.triton import checks as triton_checks
from harness.engines.known_model import KnownModel
from harness.engines.shared import ragged_kernels
from harness.engines.shared.auto_tp_families import check_auto_tp

ORDER = {"cuda": (Kernels.triton, Kernels.deepspeed, Kernels.torch), "cpu": (Kernels.native, Kernels.torch)}
NAMES = {Kernels.triton: "Triton's", Kernels.deepspeed: "DeepSpeed's", Kernels.native: "the native"}
OTHERS = "use engine.kernels=torch or auto"
Capability = tuple[int, int]  # a CUDA device's compute capability


def check(engine: FastGenConfig, known: KnownModel, accelerator: str) -> None:
    """Refuses kernels that cannot compute the model, as far as its config alone says so.

    Raises:
        UserError: the kernels asked for cannot; or AutoTP, with which PyTorch's shard, is not known to.
    """
    for kernels in _candidates(engine.kernels, accelerator):
        reason = None
        if kernels is Kernels.torch:
            check_auto_tp(known.tp, known.architecture.get("model_type"))
        else:
            reason = unsupported(kernels, known, engine.quantization)
        if reason is None:
            return
        if engine.kernels is kernels and known.architecture:
            raise _refused(kernels, reason)


def choose(settings: EngineSettings[FastGenConfig]) -> tuple[Runner, str | None]:
    """Returns the fastest kernels that can run, or the ones asked for; and a note where there is something to say.

    Raises:
        UserError: those asked for cannot run here.
    """
    known = KnownModel.of(settings.source, settings.dtype, settings.tp, settings.max_context)
    made: list[Runner] = []

    def attempt(kernels: Kernels) -> str | None:
        try:
            made.append(_built(kernels, settings))
        except (ImportError, BuildError) as error:
            return one_line(str(error), 300)
        return None

    accelerator = "cuda" if settings.device.startswith("cuda") else "cpu"
    taken, reasons = _first(settings.engine, known, accelerator, lambda: _capability(settings.device), attempt)
    runner = made[0] if made else _built(Kernels.torch, settings)
    return runner, _note(taken, reasons) or _interpreted(taken, settings)


def foretell(
    engine: FastGenConfig, known: KnownModel, accelerator: str, capability: Capability | None
) -> tuple[Kernels, dict[Kernels, str]]:
    """Returns what :func:`choose` will take on this machine, and why not those before it, without making a runner.

    Args:
        capability: of the CUDA device; None where there is none, or nobody can tell.

    Raises:
        UserError: those asked for cannot run here.
    """
    return _first(engine, known, accelerator, lambda: capability, _untried)


def missing(kernels: Kernels, engine: FastGenConfig, accelerator: str, capability: Capability | None) -> str | None:
    """Returns why kernels cannot run on this machine, whatever the model; None when they can.

    Args: see :func:`foretell`.
    """
    if kernels is Kernels.torch:
        return None
    if kernels not in ORDER[accelerator]:
        return "they need CUDA" if accelerator == "cpu" else "they compute on a CPU"
    if kernels is Kernels.native and (lacks := native_checks.processor_lacks()) is not None:
        return lacks
    return _missing(kernels, engine, lambda: capability) or _untried(kernels)


def unsupported(kernels: Kernels, known: KnownModel, quantization: str | None = None) -> str | None:
    """Returns why kernels do not compute a model, by its config alone; None when they do."""
    if kernels is Kernels.deepspeed:
        return ragged_kernels.unsupported(known, quantization)
    if quantization is not None:
        return f"they have no {quantization} weights (engine.quantization)"
    return triton_checks.unsupported(known) if kernels is Kernels.triton else native_checks.unsupported(known)


def after(kernels: str) -> tuple[Kernels, ...]:
    """Returns what ``auto`` takes, in order, where these kernels turn out not to do."""
    order = next(order for order in ORDER.values() if Kernels(kernels) in order)
    return order[order.index(Kernels(kernels)) + 1 :]


def _first(
    engine: FastGenConfig,
    known: KnownModel,
    accelerator: str,
    capability: Callable[[], Capability | None],
    attempt: Callable[[Kernels], str | None],
) -> tuple[Kernels, dict[Kernels, str]]:
    """Returns the first kernels that nothing speaks against, and what speaks against those before; raises UserError.

    Args:
        attempt: returns why the kernels cannot be had after all; None when they can.
    """
    reasons: dict[Kernels, str] = {}
    for kernels in _candidates(engine.kernels, accelerator):
        if kernels is Kernels.torch:
            break
        reason = (
            unsupported(kernels, known, engine.quantization)
            or _missing(kernels, engine, capability)
            or attempt(kernels)
        )
        if reason is None:
            return kernels, reasons
        reasons[kernels] = reason
    if engine.quantization is not None and Kernels.deepspeed in reasons:
        found = f"{engine.quantization}: {reasons[Kernels.deepspeed]}"
        raise UserError("engine.quantization", found, "use engine.quantization=null")
    if engine.kernels in reasons:
        raise _refused(engine.kernels, reasons[engine.kernels])
    return Kernels.torch, reasons


def _candidates(asked: Kernels, accelerator: str) -> tuple[Kernels, ...]:
    return ORDER[accelerator] if asked is Kernels.auto else (asked,)


def _missing(kernels: Kernels, engine: FastGenConfig, capability: Callable[[], Capability | None]) -> str | None:
    """Returns what kernels lack on this machine; None when all is there."""
    if kernels is Kernels.native:
        return None  # instructions are looked at with the model
    quantization = engine.quantization
    reason = triton_checks.not_installed() if kernels is Kernels.triton else ragged_kernels.not_installed(quantization)
    if reason is not None or (found := capability()) is None:
        return reason
    if kernels is Kernels.triton:
        return triton_checks.device_unsupported(found)
    return ragged_kernels.device_unsupported(quantization, found[0])


def _capability(device: str) -> Capability | None:
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_capability(device)


def _untried(kernels: Kernels) -> str | None:
    """Returns why kernels cannot be built here, as far as it shows without building them."""
    if kernels is not Kernels.native:
        return None
    try:
        build.ready()
    except BuildError as error:
        return one_line(str(error), 300)
    return None


def _built(kernels: Kernels, settings: EngineSettings[FastGenConfig]) -> Runner:
    """Returns the kernels' runner; raises ImportError or BuildError where something of theirs is missing."""
    if kernels is Kernels.triton:
        from harness.engines.fastgen.runners.triton.runner import TritonRunner

        return TritonRunner(settings)
    if kernels is Kernels.deepspeed:
        from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner

        return DeepSpeedRunner(settings)
    if kernels is Kernels.native:
        from harness.engines.fastgen.runners.native_runner import NativeRunner

        return NativeRunner(settings)
    from harness.engines.fastgen.runners.torch_runner import TorchRunner

    return TorchRunner(settings)


def _note(taken: Kernels, reasons: dict[Kernels, str]) -> str | None:
    others = "; nor ".join(f"{NAMES[kernels]} kernels: {reason}" for kernels, reason in reasons.items())
    return f"engine.kernels=auto took {taken.value}, not {others}" if others else None


def _interpreted(kernels: Kernels, settings: EngineSettings[FastGenConfig]) -> str | None:
    return triton_checks.INTERPRETED if kernels is Kernels.triton and settings.device == "cpu" else None


def _refused(kernels: Kernels, reason: str) -> UserError:
    return UserError("engine.kernels", f"{kernels.value}: {reason}", OTHERS)
