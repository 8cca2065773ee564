"""The keys of ``engine=mii``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from harness.config.key import key
from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order


@dataclass
class MiiConfig(EngineConfig):
    """MII's own defaults, and the order in which a user of it would send the requests."""

    name: str = key("mii", "set by the option")
    token_budget: int = key(768, "tokens in a pass", unit="tokens", allowed="whole number, at least `max_sequences`")
    max_sequences: int = key(512, "sequences in a pass", unit="sequences")
    order: Order = key(Order.dataset, "as a user of MII would send them, or longest first")
    kv_memory: Union[int, float, str] = key(  # noqa: UP007 (OmegaConf reads typing.Union)
        0.9,
        "the KV cache: a fraction of what the weights leave free, or so much",
        unit="bytes",
        allowed="a fraction up to 1, bytes, or a size such as `20GiB`",
    )
    quantization: str | None = key(None, "FP6 weights, float16 activations (A100)", allowed="`null`, `wf6af16`")
