"""The schema of ``conf/``: typed groups.

Nothing here imports torch, transformers or deepspeed, so that a wrong config is refused within a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from harness.config.key import key


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


class Export(Enum):
    """Other formats that a run's completions are also written in."""

    openai_batch = "openai_batch"


class Accelerator(Enum):
    """What the ranks run on; PyTorch calls AMD's devices ``cuda`` too."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass
class EngineConfig:
    """Which engine runs the job. Each engine's own keys are a subclass in its room (:mod:`harness.engines.room`)."""

    name: str = key(MISSING, "set by the option")


@dataclass
class ModelConfig:
    """Where the weights and the tokenizer come from, and in which type they are used."""

    name: str = key(
        MISSING,
        "set by the option; the record has the checkpoint's own name where none was chosen, or another than that",
        allowed="1 to 200 printable characters",
    )
    path: str | None = key(None, "where the weights are", allowed="a local directory, a GGUF file or a hub id")
    tokenizer: str | None = key(
        None, "the tokenizer; `null` is the model's own", allowed="a local directory or a hub id"
    )
    demo: bool = key(False, "fetch the demo model when `path` is `null`; set by the option")
    weights: Weights = key(
        Weights.pretrained, "read a checkpoint, or draw random weights of the real shape from `architecture`"
    )
    dtype: DType = key(
        DType.auto,
        "of weights and activations; `auto` is bfloat16 where the device computes it, else float32; "
        "no float16 on a CPU",
    )
    trust_remote_code: bool = key(False, "run code that lies beside the weights")
    allow_pickle: bool = key(False, "read pickled weights, their tensors alone")
    max_context: int | None = key(None, "longest prompt plus output; `null` is the model's own limit", unit="tokens")
    architecture: dict[str, Any] = key({}, "what `weights: dummy` makes", allowed="keys of a `config.json`")


@dataclass
class DatasetConfig:
    """Which requests are run, and how many."""

    name: str = key(MISSING, "set by the option", allowed="the options")
    path: str | None = key(
        None,
        "the prompts; not of `sample` and `synthetic`, which have their own",
        allowed="a file; of `huggingface` a directory",
    )
    num_samples: int | None = key(
        None, "the first N, for testing; `null` is all; of `synthetic` how many (64)", unit="requests"
    )
    input_len: Any = key(
        None,
        "`synthetic` alone (128): length of every prompt",
        unit="tokens",
        allowed="whole number up to 1,000,000; `uniform:LOW:HIGH`, `lognormal:MEDIAN:SIGMA`, `file:PATH`",
    )
    output_len: Any = key(
        None,
        "tokens to generate: of `synthetic` (64), of `sharegpt` in place of its replies', where a file has none",
        unit="tokens",
        allowed="whole number up to 1,000,000; `uniform:LOW:HIGH`, `lognormal:MEDIAN:SIGMA`, `file:PATH`",
    )
    prompt: SyntheticPrompt = key(
        SyntheticPrompt.hi,
        '`synthetic` alone: the committee\'s `"hi" * (input_len - 1)`, or `input_len` token ids drawn with the seed',
    )
    shared_prefix: int = key(
        0,
        "`synthetic` with `prompt: random`: drawn ids that prompts have in common, before their `input_len` own ones",
        unit="tokens",
        allowed="whole number from 0",
    )
    prefixes: int = key(1, "how many such beginnings there are; prompts take them in turn", allowed="whole number")
    shuffle: bool = key(False, "another order of the file's requests, by the seed, before `num_samples` are taken")
    chat_template: bool = key(False, "make a chat of every prompt, by the template that the model brings")
    system_prompt: str | None = key(
        None, "with `chat_template`: first message of chats that have no system message", allowed="a text"
    )
    seed: int = key(0, "of everything that is drawn: ids, lengths, order", allowed="0 to 2^63 - 1")
    prompt_field: str | None = key(
        None,
        "the prompt's field, by dots what lies deeper (`input.text`); `null`: `prompt`, `messages`, `text`, "
        "`question`, `instruction` or `input`",
        allowed="a name",
    )
    output_len_field: str | None = key(
        None,
        "the output length's field; `null`: `output_len`, `max_tokens`, `max_new_tokens` or `max_completion_tokens`",
        allowed="a name",
    )
    id_field: str | None = key(
        None, "the field of the request's id; `null`: `id`, `custom_id` or `request_id`", allowed="a name"
    )
    split: str | None = key(None, "of `huggingface`: which of several splits", allowed="a name")


@dataclass
class GenerationConfig:
    """When a request is finished. Decoding is greedy, as in the challenge."""

    stop: Stop = key(
        Stop.eos,
        "end at the model's end-of-sequence token or at `output_len`, the challenge's rule; "
        "or at exactly `output_len` tokens",
    )
    max_output_len: int | None = key(None, "caps every request's `output_len`; the record says so", unit="tokens")
    stop_strings: list[str] = key(
        [],
        "texts that end a request as soon as they are generated; its text ends before them",
        allowed="a list of texts",
    )
    stop_token_ids: list[int] = key(
        [], "ids that end a request as the end-of-sequence token does", allowed="a list of ids of the model"
    )


@dataclass
class ParallelConfig:
    """Ranks: ``tp`` shards one model, ``dp`` runs replicas; the launch has ``tp * dp`` ranks.

    None is chosen by what fits (:mod:`harness.running.split`); a run's own config has the numbers.
    """

    tp: int | None = key(
        None, "ranks that share one model (tensor parallel); `null` is what `parallel=auto` chooses", unit="ranks"
    )
    dp: int | None = key(None, "replicas (data parallel); a launch has `tp * dp` ranks", unit="ranks")


@dataclass
class HardwareConfig:
    """Figures of one device, from its data sheet or measured; null is unknown and leaves utilisation empty.

    Bandwidths are bytes/s in one direction. ``fit`` is what ``harness.plan --fit`` has found (``harness.costs.fit``),
    ``device_names`` what the driver calls devices that these figures are of.
    """

    name: str = key(MISSING, "set by the option", allowed="1 to 200 printable characters")
    accelerator: Accelerator = key(
        Accelerator.cpu,
        "what a plan's ranks run on; PyTorch calls AMD's devices `cuda` too. A run looks for itself",
    )
    peak_flops: dict[str, float | None] = key(
        {},
        "dense, without sparsity",
        unit="FLOP/s",
        allowed="a number or `null` for `float32`, `bfloat16`, `float16`; for plans also `float8`, `int8`, "
        "`float4`, `int4`",
    )
    memory_bytes: int | None = key(None, "of a device, as sold", unit="bytes")
    memory_bandwidth: float | None = key(None, "between a device and its memory", unit="bytes/s")
    interconnect_bandwidth: float | None = key(
        None, "between devices of a host, one direction per device", unit="bytes/s"
    )
    devices_per_node: int | None = key(None, "of a host", unit="devices")
    node_bandwidth: float | None = key(
        None, "between hosts, one direction per device; the options' are assumptions", unit="bytes/s"
    )
    price_per_hour: float | None = key(
        None,
        "what one device (of `cpu`: a host) costs, in a currency of your choice; for `cost_per_million_tokens`",
        unit="per hour",
        allowed="a number above 0",
    )
    device_names: list[str] = key(
        [], "what the CUDA driver calls devices that these figures are of", allowed="a list of texts"
    )
    fit: dict[str, Any] = key({}, "what was fitted to runs", allowed="written by a fit")


@dataclass
class TrackingConfig:
    """Where a run is told of beside ``results_dir``, once its clock has stopped."""

    name: str = key("none", "set by the option", allowed="the options")
    uri: str | None = key(
        None,
        "where MLflow keeps runs; `null` is the environment's `MLFLOW_TRACKING_URI`, else `mlflow` in `results_dir`",
        allowed="a directory, or a server's `http://HOST:PORT`",
    )
    experiment: str = key(
        "llama-harness",
        "MLflow's name for runs that belong together; made if missing",
        allowed="1 to 200 printable characters",
    )


@dataclass
class SweepConfig:
    """How ``--multirun`` treats jobs that already ran, and what it does with the best of a search."""

    resume: bool = key(False, "with `-m`: leave out the jobs that are ok already (config, dataset, device, code)")
    confirm: int = key(
        0,
        "of a search: so many of its best are run again on more requests (`tune`: 3)",
        unit="runs",
        allowed="0 to 1000",
    )
    confirm_samples: int | None = key(
        None, "requests for that; `null` is 4 times `dataset.num_samples`", unit="requests"
    )
    confirm_rounds: int = key(
        8, "of a search: so often each of them runs then, in turn with the defaults", unit="rounds", allowed="1 to 1000"
    )
    least_s: float = key(
        0.0,
        "a job whose clocks add up to less runs again, up to 8 times; of a search it gets more requests first "
        "(`tune`: 3)",
        unit="seconds",
        allowed="a number from 0",
    )
    save_as: str | None = key(
        None,
        "of a search: the winner's name among the experiments in `conf/`; `null` is `tuned_<checkpoint>_<machine>`, "
        "in `results_dir`",
        allowed="letters, digits, `_`, `-`",
    )


@dataclass
class Config:
    """One run, resolved."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    results_dir: str = key("results", "one directory a run, and `runs.csv`", allowed="a directory, made if missing")
    resume: str | None = key(
        None,
        "do what that run left undone, with the same other settings (`results/README.md`)",
        allowed="a run id",
    )
    repeat: int = key(
        1,
        "runs of this config, each a launch and a row of its own; then median and spread. With `-m` the jobs run in "
        "rounds, every other one backwards: A B C, C B A",
        unit="runs",
        allowed="whole number up to 10,000",
    )
    repeat_until: str | None = key(
        None,
        "repeats until the 99% interval of the median throughput is no wider than this part of it, at most `repeat` "
        "times, or 30",
        allowed="a share such as `2%` or `0.02`",
    )
    verify: int = key(
        0,
        "so many random requests are checked against Hugging Face's `generate` after the clock",
        unit="requests",
        allowed="whole number from 0",
    )
    export: Export | None = key(
        None,
        "writes the completions in another format too, after the clock: `openai_batch_output.jsonl`",
        allowed="`openai_batch`",
    )
    preflight: bool = key(
        True,
        "refuse what certainly does not fit into memory before anything is loaded; `false` tries it all the same",
    )
    requeue: bool = key(
        False,
        "a Slurm job that is preempted, or whose time is nearly over, is queued again and resumes its run "
        "(`launch/NODES.md`)",
    )
    timeout_s: float | None = key(
        None, "the run is ended after that, with status `timeout`", unit="seconds", allowed="0.001 to 1e9"
    )
    power_limit_w: float | None = key(
        None,
        "a rule of the run: what its GPUs and processor packages may draw together; the record has the verdict, and "
        "the run is refused where nothing measures it",
        unit="watts",
        allowed="a number above 0",
    )
