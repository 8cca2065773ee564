"""A composed config made ready to run: everything that can be refused without loading a model is, here.

The launching parent and every rank go through the same function, so both refuse the same things.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError
from harness.basics.places import LAUNCHED
from harness.config import checks
from harness.config.checks import check_kv_heads
from harness.config.compose import to_config
from harness.config.explain import explain
from harness.config.identity import config_hash
from harness.config.schema import Config, DType, ParallelConfig
from harness.costs import memory as costs
from harness.costs.fitted import Fitted
from harness.costs.memory import Memory
from harness.costs.pass_sizes import PassSizes
from harness.engines import catalogue
from harness.engines.known_model import KnownModel
from harness.machine import device, snapshot
from harness.models import chat, ends, locate
from harness.models.architecture import context_length
from harness.models.source import Source
from harness.ranks.rank import Rank
from harness.results import batch_output
from harness.running import preflight, sizes, split, target, tracking
from harness.running.preflight import memory_needs
from harness.running.split import Split
from harness.running.target import Target
from harness.workload import reading
from harness.workload.records import Workload


@dataclass(frozen=True, slots=True)
class Job:
    """What a run needs to know before anything heavy is imported.

    Attributes:
        config: with numbers for ``parallel`` and the engine's sizes, whatever was asked.
        settings: the same as plain data, for ``config.yaml`` and the record.
        split: what the ranks were asked to be, and why they are what they are.
        dtype: torch type of weights and activations, ``auto`` resolved.
        max_context: longest prompt plus output in tokens, None where the model states none.
        job_hash: 12 hex digits, equal for runs of the same config on the same dataset, kind of device and code; empty
            for a job that is only planned.
        prediction: what the record says of the run beforehand: ``peak_memory_bytes`` of a rank, where it can be told.
        simulated: whether one process here plays all ranks, on the machine that ``config.hardware`` describes.
        sizes: how large the engine's passes are and why, where the config left it open; else None.
    """

    config: Config
    settings: dict[str, Any]
    split: Split
    accelerator: str
    dtype: str
    workload: Workload
    source: Source
    max_context: int | None
    job_hash: str
    prediction: dict[str, Any] = field(default_factory=dict)
    simulated: bool = False
    sizes: PassSizes | None = None

    @property
    def choices(self) -> dict[str, Any]:
        """What the record says of the choices that were made: the split, and the engine's sizes where they were."""
        return {"split": self.split.record} | ({} if self.sizes is None else {"sizes": self.sizes.record})

    @property
    def tp(self) -> int:
        """Ranks that share one model."""
        return self.split.tp

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.split.dp

    @property
    def ranks(self) -> int:
        """All ranks of the run."""
        return self.tp * self.dp

    @property
    def processes(self) -> int:
        """Processes that run them."""
        return 1 if self.simulated else self.ranks

    @property
    def runs_on(self) -> str:
        """What these processes need, ``cpu`` or ``cuda``: not what they simulate."""
        return "cpu" if self.simulated else self.accelerator

    @property
    def work(self) -> dict[str, Any]:
        """What the record says of the work itself: whatever resumes a run must have it in common."""
        return {
            "model": locate.model_name(self.config.model, self.source),
            "dtype": self.dtype,
            "dataset_sha256": self.workload.sha256,
        }


def resolved(composed: DictConfig) -> dict[str, Any]:
    """Returns the composed config as plain data, for ``config.yaml`` and the record."""
    data = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def prepare(composed: DictConfig, rank: Rank | None = None, planned: Target | None = None) -> Job:
    """Checks config, dataset, model and memory, and settles how the ranks are split.

    Args:
        rank: this process in the launch that runs the job; None where it is to start one.
        planned: the machine that the job is for; None is this one, or the described one if the engine simulates.
            Elsewhere the model need not be here.

    Raises:
        UserError: for the first that is wrong.
    """
    try:
        config = to_config(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    simulated = planned is None and catalogue.find(config.engine.name).simulates
    if simulated:
        planned = target.described(config.hardware, rank.world if rank is not None and rank.world > 1 else None)
    accelerator = device.accelerator() if planned is None else planned.accelerator
    config, settings = sizes.with_cache(config, resolved(composed), accelerator)
    check(config, accelerator)
    if (planned is None or simulated) and (rank is None or rank.first):
        tracking.check(config.tracking, config.results_dir)
    requests = reading.read(config.dataset)
    if config.export is not None:
        batch_output.check_ids(requests.requests)
    source = locate.locate(config.model) if planned is None else locate.described(config.model)
    if planned is None:
        reading.check_stop(requests, config.generation.stop_strings)
        ends.check(config.generation, source)
    if config.dataset.chat_template:
        chat.check(config.model, source)
    dtype = resolve_dtype(config.model.dtype, accelerator)
    max_context = context_length(source.architecture, config.model.max_context)
    catalogue.find(config.engine.name).check_model(KnownModel.of(source, dtype, max_context=max_context))
    job = Job(
        config=config,
        settings=settings,
        split=Split((config.parallel.tp, config.parallel.dp), 1, 1, ""),
        accelerator=accelerator,
        dtype=dtype,
        workload=requests,
        source=source,
        max_context=max_context,
        job_hash="",
        simulated=simulated,
    )
    machine = planned or target.this_machine(config, accelerator, rank)
    chosen = choose(job, machine)
    job = sizes.settle(replace(job, config=_with_split(config, chosen.tp, chosen.dp), split=chosen), machine)
    check(job.config, accelerator)
    settings = job.settings | {"parallel": asdict(job.config.parallel)}
    runs = planned is None or simulated  # of another machine's job no run will bear the hash
    job = replace(job, settings=settings, job_hash=_job_hash(settings, accelerator, requests) if runs else "")
    _check_sharding(job)
    return job if planned else _preflight(job, machine, job.ranks if rank is None else rank.local_world)


def _preflight(job: Job, machine: Target, local_ranks: int) -> Job:
    """Returns the job with what is predicted of it; raises UserError where its memory certainly does not suffice."""
    if job.config.preflight:
        preflight.check_copies(job, local_ranks)
    if job.config.preflight and job.accelerator == "cpu":
        preflight.check_host(job, local_ranks)
    elif job.config.preflight:
        preflight.check_devices(job, machine, lambda tp, dp: refusal(job, tp, dp))
    return replace(job, prediction=preflight.prediction(job, machine, local_ranks))


def with_split(composed: DictConfig, tp: int, dp: int) -> DictConfig:
    """Returns ``composed`` with these numbers given."""
    given = composed.copy()
    given.parallel.tp, given.parallel.dp = tp, dp
    return given


def _with_split(config: Config, tp: int, dp: int) -> Config:
    return replace(config, parallel=ParallelConfig(tp, dp))


def choose(job: Job, machine: Target) -> Split:
    """Returns how the ranks are split, by the memory there is and the sums of the engines; raises UserError."""
    memory, needs = machine.memory, memory_needs(job)
    # A replica that nobody knows the size of, or has a request for, is not one to start unasked.
    nodes = 1 if needs is None else min(machine.launch.nodes, len(job.workload.requests))
    launch = replace(machine.launch, nodes=max(nodes, 1))
    known = split.FITS if launch.nodes == 1 else split.NODES

    def found(ranks: int) -> Memory:
        # Ranks that there are anyway find memory in other nodes too, if they must.
        return memory.in_nodes(ranks) if launch.nodes > 1 else replace(memory, bound=())

    chosen = split.choose(
        job.split.asked,
        launch,
        lacks=lambda tp, ranks_here: costs.shortage(tp, ranks_here, found(ranks_here), needs),
        refusal=lambda tp, dp: refusal(job, tp, dp),
        fits=split.UNKNOWN if needs is None or memory.size is None else known,
    )
    return replace(chosen, why=chosen.why + (_idle(machine, chosen) if machine.here else ""))


def _idle(machine: Target, chosen: Split) -> str:
    """Returns how to use the GPUs that a run which started by itself has left."""
    if machine.accelerator != "cuda" or machine.launch.ranks is not None or not chosen.chosen:
        return ""
    devices = device.cuda_devices()
    idle = devices - chosen.tp * chosen.dp
    return f"; deepspeed --num_gpus {devices} {LAUNCHED} uses the other {idle} GPUs too" if idle > 0 else ""


def refusal(job: Job, tp: int, dp: int) -> UserError | None:
    """Returns why the run cannot be split so, whatever the memory; None when it can."""
    architecture = job.source.architecture
    heads = [architecture.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    if any(isinstance(count, int) and count % tp for count in heads):
        found = f"{tp} does not divide its {heads[0]} attention and {heads[1] or heads[0]} key/value heads"
        return UserError("parallel.tp", found)
    tried = replace(job, config=_with_split(job.config, tp, dp), split=replace(job.split, tp=tp, dp=dp))
    try:
        check(tried.config, job.accelerator)
        _check_sharding(tried)
    except UserError as error:
        return error
    return None


def _check_sharding(job: Job) -> None:
    """Raises UserError for a model that so many ranks cannot share."""
    config, source = job.config, job.source
    check_kv_heads(job.tp, source.architecture.get("num_key_value_heads"))
    known = KnownModel.of(source, job.dtype, job.tp, job.max_context)
    catalogue.find(config.engine.name).check_shards(config, known, job.accelerator)


def check(config: Config, accelerator: str) -> None:
    """Refuses what cannot work; raises UserError, naming the field, its value and the way out."""
    checks.check(config)
    Fitted.of(config.hardware.fit)  # refuses one that is none
    catalogue.check(config, accelerator)


def hash_of(composed: DictConfig) -> str | None:
    """Returns what tells a job from others; None of one that is refused: its row will say why."""
    try:
        return prepare(composed).job_hash
    except UserError:
        return None


def _job_hash(data: dict[str, Any], accelerator: str, requests: Workload) -> str:
    facts = [config_hash(data), requests.sha256, accelerator, snapshot.code_fingerprint()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def resolve_requests(job: Job, tokenizer: Any) -> Workload:
    """Returns the job's requests, settled by its model's tokenizer, vocabulary and context; raises UserError."""
    return reading.resolve(
        job.workload,
        job.config.generation,
        vocab_size=job.source.architecture.get("vocab_size"),
        count_tokens=lambda texts: [len(ids) for ids in tokenizer(texts).input_ids],
        render=lambda chats: chat.rendered(tokenizer, chats),
        max_context=job.max_context,
    )


def resolve_chats(job: Job) -> Workload | None:
    """Returns the job's requests where they are chats, before anything is loaded: a template may refuse one.

    Raises:
        UserError: it does, or the tokenizer cannot be read.
    """
    if not job.config.dataset.chat_template:
        return None
    from harness.models.tokenizer import load_tokenizer

    return resolve_requests(job, load_tokenizer(chat.tokenizer_of(job.config.model, job.source)))


def resolve_dtype(dtype: DType, accelerator: str) -> str:
    """Returns the torch type to use: ``auto`` is bfloat16 where the device computes it, else float32."""
    if dtype is not DType.auto:
        return dtype.value
    if accelerator == "cuda" or device.supports_bfloat16_on_cpu():
        return "bfloat16"
    return "float32"
