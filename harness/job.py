"""A composed config made ready to run: everything that can be refused without loading a model is, here.

The launching parent and every rank go through the same function, so both refuse the same things.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import checkpoint, environment, workload
from harness.checkpoint import Source
from harness.config import Config, DType, Kernels, check, check_auto_tp, check_kv_heads, to_config
from harness.engines.attention_checks import refuse_by_its_file
from harness.engines.fastgen.deepspeed_checks import PICKLED, unsupported
from harness.engines.fastgen.native import checks as native_checks
from harness.errors import UserError
from harness.explain import explain
from harness.results import config_hash
from harness.workload import Workload

RANK_BYTES = (
    300 * 2**20
)  # that a process holds for itself once torch and DeepSpeed are imported (measured: 313 to 324 MiB)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Job:
    """What a run needs to know before anything heavy is imported.

    Attributes:
        dtype: torch type of weights and activations, ``auto`` resolved.
        max_context: longest prompt plus output in tokens, None where the model states none.
        job_hash: 12 hex digits, equal for runs of the same config on the same dataset, kind of device and code.
    """

    config: Config
    accelerator: str
    dtype: str
    workload: Workload
    source: Source
    max_context: int | None
    job_hash: str

    @property
    def work(self) -> dict[str, Any]:
        """What the record says of the work itself: whatever resumes a run must have it in common."""
        return {
            "model": checkpoint.model_name(self.config.model, self.source),
            "dtype": self.dtype,
            "dataset_sha256": self.workload.sha256,
        }


def resolved(composed: DictConfig) -> dict[str, Any]:
    """Returns the composed config as plain data, for ``config.yaml`` and the record."""
    data = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def prepare(composed: DictConfig, local_ranks: int | None = None) -> Job:
    """Checks config, dataset, model and memory; raises UserError for the first that is wrong.

    Args:
        local_ranks: ranks on this host; None for all of them.
    """
    try:
        config = to_config(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    accelerator = environment.accelerator()
    check(config, accelerator)
    requests = workload.read(config.dataset)
    source = checkpoint.locate(config.model)
    check_kv_heads(config.parallel.tp, source.architecture.get("num_key_value_heads"))
    dtype = resolve_dtype(config.model.dtype, accelerator)
    max_context = checkpoint.context_length(source.architecture, config.model.max_context)
    if config.engine.name in ("fastgen", "ds_inference"):
        refuse_by_its_file(source.architecture, max_context, config.engine.name)
    parallel = config.parallel
    if config.engine.name != "mii" and not _ragged_kernels(config, accelerator, source, dtype, max_context):
        check_auto_tp(parallel.tp, source.architecture.get("model_type"))
    _check_native(config, source, dtype)
    ranks = local_ranks or parallel.tp * parallel.dp
    if accelerator == "cpu":  # a device's free memory is not known before torch is there
        _check_ranks(ranks, parallel.tp)
        _check_memory(source, dtype, -(-ranks // parallel.tp))
    return Job(
        config=config,
        accelerator=accelerator,
        dtype=dtype,
        workload=requests,
        source=source,
        max_context=max_context,
        job_hash=_job_hash(resolved(composed), accelerator, requests),
    )


def _job_hash(data: dict[str, Any], accelerator: str, requests: Workload) -> str:
    facts = [config_hash(data), requests.sha256, accelerator, environment.code_fingerprint()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def resolve_dtype(dtype: DType, accelerator: str) -> str:
    """Returns the torch type to use: ``auto`` is bfloat16 where the device computes it, else float32."""
    if dtype is not DType.auto:
        return dtype.value
    if accelerator == "cuda" or environment.supports_bfloat16_on_cpu():
        return "bfloat16"
    return "float32"


def _ragged_kernels(config: Config, accelerator: str, source: Source, dtype: str, max_context: int | None) -> bool:
    """Returns whether DeepSpeed's ragged kernels shard the model; raises UserError if they are asked for and cannot."""
    engine = config.engine
    if engine.name != "fastgen" or accelerator != "cuda" or engine.kernels is Kernels.torch:
        return False
    reason = unsupported(
        source.architecture,
        dtype,
        config.parallel.tp,
        engine.quantization,
        max_context,
        dummy=source.kind == "dummy",
        remote_code=source.trust_remote_code,
    )
    if source.pickled:
        reason = PICKLED
    if reason is not None and engine.kernels is Kernels.deepspeed and source.architecture:
        raise UserError("engine.kernels", f"deepspeed: {reason}", "use engine.kernels=torch or auto")
    return reason is None


def _check_native(config: Config, source: Source, dtype: str) -> None:
    """Raises UserError if the native kernels are asked for and cannot compute the model."""
    if config.engine.name != "fastgen" or config.engine.kernels is not Kernels.native or not source.architecture:
        return
    reason = native_checks.unsupported(
        source.architecture,
        dtype,
        config.parallel.tp,
        dummy=source.kind == "dummy",
        remote_code=source.trust_remote_code,
    )
    if reason is not None:
        raise UserError("engine.kernels", f"native: {reason}", "use engine.kernels=torch or auto")


def _check_ranks(ranks: int, tp: int) -> None:
    """Raises UserError for more processes than this host's memory holds."""
    free = environment.available_memory_bytes()
    if ranks > 1 and ranks * RANK_BYTES > free:
        raise UserError(
            "parallel",
            f"{ranks} ranks need {ranks * RANK_BYTES / 2**30:.1f} GiB before they load a model, "
            f"{free / 2**30:.1f} GiB of memory are free",
            f"ask for at most {max(free // RANK_BYTES, 1)} ranks (tp={tp} x dp)",
        )


def _check_memory(source: Source, dtype: str, replicas: int) -> None:
    if not source.architecture:
        return
    needed = checkpoint.required_bytes(source.architecture, BYTES[dtype])
    if needed is None:
        return
    free = environment.available_memory_bytes()
    if needed * replicas > free:
        if needed <= free:
            raise UserError(
                "parallel.dp",
                f"{replicas} replicas need {needed * replicas / 2**30:.1f} GiB for their weights, "
                f"{free / 2**30:.1f} GiB of memory are free",
                f"use parallel.dp of at most {free // needed}",
            )
        raise UserError(
            "model",
            f"{dtype} weights need {needed * replicas / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free",
            f"use a smaller model{' or model.dtype=bfloat16' if dtype == 'float32' else ''}, or a larger machine",
        )
