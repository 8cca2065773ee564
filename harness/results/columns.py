"""The columns of ``runs.csv``."""

from __future__ import annotations

from typing import Any

# fmt: off
COLUMNS: tuple[str, ...] = (
    "run_id", "started_at", "status", "error", "engine", "kernels", "model", "weights", "dtype",
    "quantization", "dataset", "dataset_sha256", "stop", "requests", "completed", "rejected",
    "prompt_tokens", "output_tokens", "total_tokens", "elapsed_s", "load_s", "warmup_s",
    "requests_per_s", "total_tokens_per_s", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s",
    "latency_p50_s", "latency_p99_s", "tp", "dp", "device", "device_name", "token_budget",
    "max_sequences", "steps", "preemptions", "kv_peak_utilisation", "peak_memory_bytes",
    "model_flops_utilisation", "energy_j", "config_hash", "git_commit",
    "parity_checked", "parity_exact_share", "parity_explained_share",
)
# fmt: on


def columns_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that the config alone settles, so that a run which fails at once has them too."""

    def get(group: str, key: str) -> Any:
        section = config.get(group)
        value = section.get(key) if isinstance(section, dict) else None
        return None if value == "auto" else value  # "auto" is known only once the device is

    return {
        "engine": get("engine", "name"),
        "model": get("model", "name"),
        "weights": get("model", "weights"),
        "dtype": get("model", "dtype"),
        "quantization": get("engine", "quantization"),
        "dataset": get("dataset", "name"),
        "stop": get("generation", "stop"),
        "tp": get("parallel", "tp"),
        "dp": get("parallel", "dp"),
    }
