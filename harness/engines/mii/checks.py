"""What ``engine=mii`` refuses before anything is loaded."""

from __future__ import annotations

from typing import cast

from harness.basics.errors import UserError, quoted
from harness.config.schema import Config
from harness.engines.mii.config import MiiConfig
from harness.engines.shared import paged


def check(config: Config, accelerator: str) -> None:
    """Raises UserError for settings that cannot be, or not on this kind of device."""
    engine, dp = cast(MiiConfig, config.engine), config.parallel.dp or 1
    paged.check(engine)
    if accelerator != "cuda":
        raise UserError("engine", "mii needs CUDA, and this run is on cpu", "use engine=fastgen")
    if strings := config.generation.stop_strings:
        found = f"{quoted(strings[0])}: MII ends requests by single ids alone"
        raise UserError("generation.stop_strings", found, "use generation.stop_token_ids, or engine=fastgen")
    paged.check_quantization(engine, config.model.dtype, accelerator, has=True)
    if dp > 1:
        raise UserError(
            "parallel.dp",
            f"{dp}: MII's pipeline is one replica a launch",
            "use parallel.dp=1, or engine=fastgen",
        )
