"""The schema of ``conf/``: typed groups, and the checks that span fields.

Nothing here imports torch, transformers or deepspeed, so that a wrong config is refused within a second.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Union

from omegaconf import MISSING, DictConfig, OmegaConf

from harness.errors import UserError, quoted


class Kernels(Enum):
    """Which forward pass ``engine=fastgen`` uses: ``auto`` is deepspeed on CUDA, native on CPUs, torch elsewhere."""

    auto = "auto"
    deepspeed = "deepspeed"
    native = "native"
    torch = "torch"


class Weights(Enum):
    """``pretrained`` reads a checkpoint; ``dummy`` draws random weights of the real shape."""

    pretrained = "pretrained"
    dummy = "dummy"


class DType(Enum):
    """Type of weights and activations; ``auto`` takes what the device computes fastest."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Stop(Enum):
    """``eos`` ends at the end-of-sequence token or ``output_len``; ``length`` at exactly ``output_len``."""

    eos = "eos"
    length = "length"


class Order(Enum):
    """In which order requests enter the engine: the dataset's, or the longest ``output_len`` first."""

    dataset = "dataset"
    longest_first = "longest_first"


class SyntheticPrompt(Enum):
    """``hi`` is the committee's prompt ``"hi" * (input_len - 1)``; ``random`` draws token ids."""

    hi = "hi"
    random = "random"


@dataclass
class EngineConfig:
    """Which engine runs the job, and how; a key that an engine has no use for is ignored by it."""

    name: str = MISSING
    kernels: Kernels = Kernels.auto
    token_budget: int = 512
    max_sequences: int = 64
    order: Order = Order.longest_first
    kv_block_size: int = 64
    kv_memory: Union[int, float, str] = 0.3  # noqa: UP007 (OmegaConf reads typing.Union)
    batch_size: int = 16
    batch_tokens: int = 32768
    kernel_inject: bool = False
    cuda_graph: bool = False
    quantization: str | None = None


@dataclass
class ModelConfig:
    """Where the weights and the tokenizer come from, and in which type they are used."""

    name: str = MISSING
    path: str | None = None
    tokenizer: str | None = None
    demo: bool = False
    weights: Weights = Weights.pretrained
    dtype: DType = DType.auto
    trust_remote_code: bool = False
    allow_pickle: bool = False
    max_context: int | None = None
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetConfig:
    """Which requests are run, and how many."""

    name: str = MISSING
    path: str | None = None
    num_samples: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    prompt: SyntheticPrompt = SyntheticPrompt.hi
    seed: int = 0


@dataclass
class GenerationConfig:
    """When a request is finished. Decoding is greedy, as in the challenge."""

    stop: Stop = Stop.eos
    max_output_len: int | None = None


@dataclass
class ParallelConfig:
    """Ranks: ``tp`` shards one model, ``dp`` runs replicas; the launch has ``tp * dp`` ranks.

    None is chosen by what fits (:mod:`harness.split`); a run's own config has the numbers.
    """

    tp: int | None = None
    dp: int | None = None


@dataclass
class HardwareConfig:
    """Peak figures of one device, from its data sheet; null is unknown and leaves utilisation empty."""

    name: str = MISSING
    peak_flops: dict[str, float | None] = field(default_factory=dict)
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    interconnect_bandwidth: float | None = None


@dataclass
class SweepConfig:
    """How ``--multirun`` treats jobs that already ran, and what it does with the best of a search."""

    resume: bool = False
    confirm: int = 0
    confirm_samples: int | None = None
    save_as: str | None = None


@dataclass
class Config:
    """One run, resolved."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    results_dir: str = "results"
    resume: str | None = None
    repeat: int = 1
    verify: int = 0
    timeout_s: float | None = None


PLACES = ("model.path", "model.tokenizer", "dataset.path")  # hosts may keep the same files in different places
GROUPS = ("engine", "model", "dataset", "generation", "parallel", "hardware")
ENGINES = ("baseline", "ds_inference", "fastgen", "mii", "simulate")
NOT_BUILT = ("simulate",)
QUANTIZATIONS = ("wf6af16",)  # what DeepSpeed's ragged engine has: FP6 weights, float16 activations
# AutoTP cuts these as they must be; others (phi3, olmo2, falcon) it cuts wrongly without a word.
AUTO_TP_FAMILIES = (
    *("cohere", "gemma", "gpt_neox", "granite", "llama", "mistral"),
    *("olmo", "phi", "qwen2", "qwen3", "smollm3", "starcoder2"),
)
MAX_SEED = 2**63 - 1
MAX_REPEAT = 10_000
TIMEOUTS_S = (1e-3, 1e9)  # what the system's timers take: below a microsecond they mean none
BYTE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def register() -> None:
    """Makes known to Hydra what ``conf/config.yaml`` names: the schema, and our plugins."""
    from hydra.core.config_store import ConfigStore

    plugins = str(Path(__file__).resolve().parent / "plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)  # Hydra takes plugins from a package hydra_plugins alone, wherever parts of it lie
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Returns the composed config as plain typed objects; raises UserError for a value that is missing."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(missing[0], "not set", f"give {missing[0]}=...")
    # Merged anew: a key that was added with + is in the composed config, though not in the schema.
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed)))
    assert isinstance(config, Config)
    return config


def check_choices(choices: Mapping[str, object]) -> None:
    """Raises UserError unless one option of each group was chosen: Hydra would merge a list of them into one."""
    for group in GROUPS:
        if not isinstance(choices.get(group), str):
            raise UserError(group, "no option, or several", f"choose one, or sweep over them with -m {group}=a,b")


def parse_bytes(setting: float | int | str) -> float:
    """Returns a number, or a text such as ``2GiB``, as a number of bytes; raises ValueError."""
    if not isinstance(setting, str):
        return setting
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", setting)
    if match is None or match[2].upper() not in BYTE_UNITS:
        raise ValueError(f"{setting!r} is not a size")
    return float(match[1]) * BYTE_UNITS[match[2].upper()]


def check(config: Config, accelerator: str) -> None:
    """Refuses what cannot work, before anything heavy is imported.

    Args:
        accelerator: ``cpu`` or ``cuda``, what the ranks will run on.

    Raises:
        UserError: naming the field, its value and the way out.
    """
    _check_numbers(config)
    _check_engine(config, accelerator)
    _check_parallel(config)
    _check_architecture(config.model.architecture, "model.architecture")
    check_sweep(config.sweep)
    for name, text in (("model.name", config.model.name), ("hardware.name", config.hardware.name)):
        if not 0 < len(text.strip()) <= 200 or not text.isprintable():
            raise UserError(name, quoted(text), "give a name of 1 to 200 printable characters")
    if not config.results_dir.strip():
        raise UserError("results_dir", quoted(config.results_dir), "name a directory")


def check_sweep(sweep: SweepConfig) -> None:
    """Raises UserError for a search that could not end well."""
    if not 0 <= sweep.confirm <= 1000:
        raise UserError("sweep.confirm", str(sweep.confirm), "give a whole number from 0 to 1000")
    if sweep.confirm_samples is not None and sweep.confirm_samples < 1:
        raise UserError(
            "sweep.confirm_samples", str(sweep.confirm_samples), "give a whole number of at least 1, or null"
        )
    if sweep.save_as is not None and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", sweep.save_as) is None:
        raise UserError("sweep.save_as", quoted(sweep.save_as), "give a name of letters, digits, _ and -")


def _check_numbers(config: Config) -> None:
    engine = config.engine
    at_least_one = {
        "engine.token_budget": engine.token_budget,
        "engine.max_sequences": engine.max_sequences,
        "engine.kv_block_size": engine.kv_block_size,
        "engine.batch_size": engine.batch_size,
        "engine.batch_tokens": engine.batch_tokens,
        "parallel.tp": config.parallel.tp,
        "parallel.dp": config.parallel.dp,
        "dataset.num_samples": config.dataset.num_samples,
        "dataset.input_len": config.dataset.input_len,
        "dataset.output_len": config.dataset.output_len,
        "generation.max_output_len": config.generation.max_output_len,
        "model.max_context": config.model.max_context,
        "repeat": config.repeat,
    }
    for name, value in at_least_one.items():
        if value is not None and not 1 <= value <= 2**31:
            raise UserError(name, str(value), f"give a whole number from 1 to {2**31}")
    if config.repeat > MAX_REPEAT:
        raise UserError("repeat", str(config.repeat), f"give a whole number from 1 to {MAX_REPEAT}")
    if not 0 <= config.verify <= 2**31:
        raise UserError("verify", str(config.verify), f"give a whole number from 0 to {2**31}")
    if not 0 <= config.dataset.seed <= MAX_SEED:  # the generator takes a negative one for its positive
        raise UserError("dataset.seed", str(config.dataset.seed), f"give a whole number from 0 to {MAX_SEED}")
    hardware = config.hardware
    peaks = {f"hardware.peak_flops.{dtype}": peak for dtype, peak in hardware.peak_flops.items()}
    peaks["hardware.memory_bytes"] = hardware.memory_bytes
    peaks["hardware.memory_bandwidth"] = hardware.memory_bandwidth
    peaks["hardware.interconnect_bandwidth"] = hardware.interconnect_bandwidth
    for dtype in hardware.peak_flops.keys() - set(DType.__members__):
        raise UserError(f"hardware.peak_flops.{dtype}", "no such type", f"choose one of {', '.join(DType.__members__)}")
    for name, peak in peaks.items():
        if peak is not None and not 0 < peak < math.inf:
            raise UserError(name, str(peak), "give the data sheet's figure, or null where it is not known")
    if config.timeout_s is not None and not TIMEOUTS_S[0] <= config.timeout_s <= TIMEOUTS_S[1]:
        raise UserError("timeout_s", str(config.timeout_s), "give seconds from 0.001 to 1e9, or null for none")
    try:
        memory = parse_bytes(engine.kv_memory)
    except ValueError:
        memory = math.nan
    if not 0 < memory < 2**60:
        raise UserError(
            "engine.kv_memory",
            quoted(engine.kv_memory),
            "give a fraction of the free memory up to 1, a number of bytes, or a size such as 2GiB",
        )


def _check_architecture(value: object, where: str) -> None:
    """Raises UserError for a NaN, which no comparison would notice, however deep."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_architecture(item, f"{where}.{key}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(where, "nan", "give a number, or null to leave it out")


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


def check_kv_heads(tp: int, kv_heads: object) -> None:
    """Raises UserError when tensor parallelism leaves a rank without a key/value head."""
    if isinstance(kv_heads, int) and tp > kv_heads:
        raise UserError(
            "parallel.tp",
            f"{tp} ranks share {kv_heads} key/value heads: some would have none",
            f"use parallel.tp of at most {kv_heads}",
        )


def check_auto_tp(tp: int, family: object) -> None:
    """Raises UserError for a model that AutoTP is not known to shard rightly."""
    if tp > 1 and family is not None and family not in AUTO_TP_FAMILIES:
        raise UserError(
            "parallel.tp",
            f"{tp}: DeepSpeed's AutoTP is not known to shard {quoted(family)} models rightly",
            "use parallel.dp for replicas, or parallel=single",
        )
