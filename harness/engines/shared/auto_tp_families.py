"""Which models DeepSpeed's AutoTP shards as they must be; told without importing DeepSpeed."""

from __future__ import annotations

from harness.basics.errors import UserError, quoted

# AutoTP cuts these as they must be; others (phi3, olmo2, falcon) it cuts wrongly without an error.
AUTO_TP_FAMILIES = (
    *("cohere", "gemma", "gpt_neox", "granite", "llama", "mistral"),
    *("olmo", "phi", "qwen2", "qwen3", "smollm3", "starcoder2"),
)


def check_auto_tp(tp: int, family: object) -> None:
    """Raises UserError for a model that AutoTP is not known to shard rightly."""
    if tp > 1 and family is not None and family not in AUTO_TP_FAMILIES:
        raise UserError(
            "parallel.tp",
            f"{tp}: DeepSpeed's AutoTP is not known to shard {quoted(family)} models rightly",
            "use parallel.dp for replicas, or parallel=single",
        )
