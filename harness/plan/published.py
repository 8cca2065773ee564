"""What systems were published to reach, for the models and machines of ``conf/``."""

from __future__ import annotations

from typing import NamedTuple

NANOFLOW = "NanoFlow, arXiv 2408.12757"
MLPERF = "MLPerf Inference"


class Published(NamedTuple):
    """One published figure.

    Attributes:
        model, hardware: the names in ``conf/`` of what it was measured with.
        workload: prompt and output tokens of a request, or the dataset.
        per_device: tokens/s of one device: prompt and output tokens where ``total``, else output tokens alone.
        lengths: prompt and output tokens of every request; None where they differ from request to request.
        bits: of weights and arithmetic, as they were run.
    """

    system: str
    model: str
    hardware: str
    devices: int
    workload: str
    per_device: float
    total: bool
    lengths: tuple[int, int] | None
    bits: int
    source: str


def _nanoflow(system: str, rate: float, workload: str, lengths: tuple[int, int] | None) -> Published:
    return Published(system, "llama2_70b", "a100_80g", 8, workload, rate, True, lengths, 16, NANOFLOW)


def _mlperf(system: str, version: str, hardware: str, rate: float, bits: int) -> Published:
    workload = "OpenOrca, offline"
    return Published(system, "llama2_70b", hardware, 8, workload, rate / 8, False, None, bits, f"{MLPERF} {version}")


PUBLISHED = (
    _nanoflow("optimum", 1857, "512 in, 512 out", (512, 512)),
    _nanoflow("NanoFlow", 1286, "512 in, 512 out", (512, 512)),
    _nanoflow("TensorRT-LLM", 735, "512 in, 512 out", (512, 512)),
    _nanoflow("vLLM", 494, "512 in, 512 out", (512, 512)),
    _nanoflow("DeepSpeed-FastGen", 490, "512 in, 512 out", (512, 512)),
    _nanoflow("NanoFlow", 1272, "ShareGPT", None),
    _nanoflow("TensorRT-LLM", 639, "ShareGPT", None),
    _nanoflow("DeepSpeed-FastGen", 335, "ShareGPT", None),
    _nanoflow("vLLM", 255, "ShareGPT", None),
    _mlperf("NVIDIA", "v5.0", "h100_80g", 31307, 8),
    _mlperf("NVIDIA", "v4.1", "h100_80g", 24525, 8),
    _mlperf("NVIDIA", "v5.0", "h200_141g", 34988, 8),
    _mlperf("NVIDIA", "v5.0", "b200_180g", 98858, 4),
    _mlperf("AMD (vLLM)", "v5.1", "mi300x_192g", 27804, 8),
)


def of(model: str, hardware: str) -> list[Published]:
    """Returns the figures of a model on such devices."""
    return [one for one in PUBLISHED if (one.model, one.hardware) == (model, hardware)]
