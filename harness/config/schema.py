"""The schema of ``conf/``: typed groups.

Nothing here imports torch, transformers or deepspeed, so that a wrong config is refused within a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


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


class SyntheticPrompt(Enum):
    """``hi`` is the committee's prompt ``"hi" * (input_len - 1)``; ``random`` draws token ids."""

    hi = "hi"
    random = "random"


class Accelerator(Enum):
    """What the ranks run on; PyTorch calls AMD's devices ``cuda`` too."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass
class EngineConfig:
    """Which engine runs the job. Each engine's own keys are a subclass in its room (:mod:`harness.engines.room`)."""

    name: str = MISSING


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

    None is chosen by what fits (:mod:`harness.running.split`); a run's own config has the numbers.
    """

    tp: int | None = None
    dp: int | None = None


@dataclass
class HardwareConfig:
    """Figures of one device, from its data sheet or measured; null is unknown and leaves utilisation empty.

    Bandwidths are bytes/s in one direction. ``fit`` is what ``harness.plan --fit`` has found (``harness.costs.fit``),
    ``device_names`` what the driver calls devices that these figures are of.
    """

    name: str = MISSING
    accelerator: Accelerator = Accelerator.cpu
    peak_flops: dict[str, float | None] = field(default_factory=dict)
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    interconnect_bandwidth: float | None = None
    devices_per_node: int | None = None
    node_bandwidth: float | None = None
    device_names: list[str] = field(default_factory=list)
    fit: dict[str, Any] = field(default_factory=dict)


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
    preflight: bool = True
    timeout_s: float | None = None
