"""The keys of ``engine=simulate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from harness.config.checks import AUTO
from harness.config.key import key
from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order


@dataclass
class SimulateConfig(EngineConfig):
    """FastGen's keys with its defaults, so that a sweep over both compares the same settings; ends and pace."""

    name: str = key("simulate", "set by the option")
    token_budget: Any = key(
        AUTO,
        "as of fastgen, of the described device",
        unit="tokens",
        allowed="whole number, at least `max_sequences`; `auto`",
    )
    max_sequences: Any = key(
        AUTO, "as of fastgen, of the described device", unit="sequences", allowed="whole number, `auto`"
    )
    order: Order = key(Order.longest_first, "as of fastgen")
    kv_block_size: int = key(64, "as of fastgen", unit="tokens")
    kv_memory: Union[int, float, str] = key(  # noqa: UP007 (OmegaConf reads typing.Union)
        AUTO,
        "as of fastgen, of the described device's memory",
        unit="bytes",
        allowed="a fraction up to 1, bytes, or a size such as `2GiB`; `auto`",
    )
    prefix_sharing: bool = key(False, "as of fastgen; prompts whose ids are not at hand share nothing")
    eos_rate: Union[int, float, str, None] = key(  # noqa: UP007 (OmegaConf reads typing.Union)
        AUTO,
        "chance that an output token ends its sequence, with `generation.stop=eos`; `auto` is what `hardware.fit` has "
        "for this model; without one every output runs to its `output_len`, and a note says so",
        unit="0 to 1",
        allowed="a number above 0, `auto`, `null`",
    )
    pace: float = key(
        0.0, "real seconds for a simulated one, to watch it; 0 is as fast as possible", allowed="a number from 0"
    )
