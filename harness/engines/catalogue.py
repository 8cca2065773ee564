"""The engines there are, and what each refuses; cheap to import."""

from __future__ import annotations

from harness.basics.errors import UserError, quoted
from harness.config.checks import check_kv_heads
from harness.config.schema import Config, DType, Kernels
from harness.engines.base import Engine, EngineSettings

ENGINES = ("baseline", "ds_inference", "fastgen", "mii", "simulate")
NOT_BUILT = ("simulate",)
QUANTIZATIONS = ("wf6af16",)  # what DeepSpeed's ragged engine has: FP6 weights, float16 activations
# AutoTP cuts these as they must be; others (phi3, olmo2, falcon) it cuts wrongly without a word.
AUTO_TP_FAMILIES = (
    *("cohere", "gemma", "gpt_neox", "granite", "llama", "mistral"),
    *("olmo", "phi", "qwen2", "qwen3", "smollm3", "starcoder2"),
)


def check(config: Config, accelerator: str) -> None:
    """Refuses what the engine cannot do, before anything heavy is imported.

    Args:
        accelerator: ``cpu`` or ``cuda``, what the ranks will run on.

    Raises:
        UserError: naming the field, its value and the way out.
    """
    _check_engine(config, accelerator)
    _check_parallel(config)


def _check_engine(config: Config, accelerator: str) -> None:
    engine = config.engine
    if engine.name not in ENGINES:
        raise UserError("engine.name", quoted(engine.name), f"choose one of {', '.join(ENGINES)}")
    if engine.name in NOT_BUILT:
        raise UserError("engine", f"{engine.name} is not built yet", "use engine=fastgen")
    if engine.token_budget < engine.max_sequences:
        raise UserError(
            "engine.token_budget",
            f"{engine.token_budget} is below engine.max_sequences={engine.max_sequences}, "
            "and every running sequence needs one token of each pass",
            "raise the budget or lower max_sequences",
        )
    if accelerator != "cuda":
        _check_engine_on_cpu(config)
    elif engine.kernels is Kernels.native:
        raise UserError(
            "engine.kernels", "native computes on a CPU, and this run is on cuda", "use engine.kernels=auto"
        )
    if engine.cuda_graph and ((config.parallel.tp or 1) > 1 or engine.kernel_inject):
        raise UserError(
            "engine.cuda_graph",
            "true: DeepSpeed captures no graph of a model that is sharded or has injected kernels",
            "use engine.cuda_graph=false, or parallel.tp=1 and engine.kernel_inject=false",
        )
    _check_quantization(config, accelerator)


def _check_engine_on_cpu(config: Config) -> None:
    engine = config.engine
    if engine.name == "mii":
        raise UserError("engine", "mii needs CUDA, and this run is on cpu", "use engine=fastgen")
    for name, asked in (("kernel_inject", engine.kernel_inject), ("cuda_graph", engine.cuda_graph)):
        if asked:
            raise UserError(
                f"engine.{name}",
                "true needs CUDA, and this run is on cpu",
                f"use engine.{name}=false",
            )
    if engine.kernels is Kernels.deepspeed:
        raise UserError(
            "engine.kernels",
            "deepspeed needs CUDA: its ragged kernels do not exist for cpu",
            "use engine.kernels=native, torch or auto",
        )
    if config.model.dtype is DType.float16:
        raise UserError(
            "model.dtype",
            "float16 is not computed well on cpu",
            "use model.dtype=bfloat16, float32 or auto",
        )


def _check_quantization(config: Config, accelerator: str) -> None:
    asked = config.engine.quantization
    if asked is None:
        return
    if asked not in QUANTIZATIONS:
        raise UserError("engine.quantization", quoted(asked), f"give null or {' or '.join(QUANTIZATIONS)}")
    name = config.engine.name
    if accelerator != "cuda" or name not in ("fastgen", "mii") or config.engine.kernels is Kernels.torch:
        raise UserError(
            "engine.quantization",
            f"{asked}: only DeepSpeed's ragged kernels on CUDA have it, this is {name} on {accelerator}",
            "use engine.quantization=null",
        )
    if config.model.dtype is not DType.float16:
        raise UserError(
            "model.dtype",
            f"{config.model.dtype.value}: engine.quantization={asked} computes with float16 activations",
            "use model.dtype=float16",
        )


def _check_parallel(config: Config) -> None:
    tp, dp = config.parallel.tp or 1, config.parallel.dp or 1
    kv_heads = config.model.architecture.get("num_key_value_heads") if config.model.path is None else None
    check_kv_heads(tp, kv_heads)
    if config.engine.name == "baseline" and tp > 1:
        raise UserError(
            "parallel.tp",
            f"{tp}: the baseline spreads a large model over devices with accelerate's device_map",
            "use parallel=single",
        )
    if config.engine.name == "mii" and dp > 1:
        raise UserError(
            "parallel.dp",
            f"{dp}: MII's pipeline is one replica a launch",
            "use parallel.dp=1, or engine=fastgen",
        )


def check_auto_tp(tp: int, family: object) -> None:
    """Raises UserError for a model that AutoTP is not known to shard rightly."""
    if tp > 1 and family is not None and family not in AUTO_TP_FAMILIES:
        raise UserError(
            "parallel.tp",
            f"{tp}: DeepSpeed's AutoTP is not known to shard {quoted(family)} models rightly",
            "use parallel.dp for replicas, or parallel=single",
        )


def create(settings: EngineSettings) -> Engine:
    """Returns the engine that ``settings.engine.name`` names, nothing loaded yet."""
    # Imported here: an engine brings torch and its own library with it.
    if settings.engine.name == "baseline":
        from harness.engines.baseline.engine import BaselineEngine

        return BaselineEngine(settings)
    if settings.engine.name == "fastgen":
        from harness.engines.fastgen.engine import FastGenEngine

        return FastGenEngine(settings)
    if settings.engine.name == "ds_inference":
        from harness.engines.ds_inference.engine import DsInferenceEngine

        return DsInferenceEngine(settings)
    if settings.engine.name == "mii":
        from harness.engines.mii.engine import MiiEngine

        return MiiEngine(settings)
    raise ValueError(f"no engine named {settings.engine.name!r}")  # config.check() lets none through
