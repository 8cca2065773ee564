"""What ``engine=simulate`` refuses before anything is read."""

from __future__ import annotations

import math
from typing import cast

from harness.basics.errors import UserError, quoted
from harness.config.checks import check_counts
from harness.config.schema import Config
from harness.engines.shared import paged
from harness.engines.simulate.config import AUTO, SimulateConfig


def check(config: Config) -> None:
    """Raises UserError for settings that cannot be."""
    engine = cast(SimulateConfig, config.engine)
    paged.check(engine)
    check_counts({"engine.kv_block_size": engine.kv_block_size})
    rate = engine.eos_rate
    if (isinstance(rate, str) and rate != AUTO) or (isinstance(rate, float | int) and not 0 < rate <= 1):
        remedy = "give a chance above 0 and up to 1, auto for the fitted one, or null for none"
        raise UserError("engine.eos_rate", quoted(rate), remedy)
    if not 0 <= engine.pace < math.inf:
        raise UserError("engine.pace", str(engine.pace), "give real seconds for a simulated one, 0 for no waiting")
    if config.verify:
        found = f"{config.verify}: the tokens of a simulation are made up, and there is nothing to check them with"
        raise UserError("verify", found, "leave it out")
    if config.export is not None:
        found = f"{config.export.value}: a simulation makes no text that could be written"
        raise UserError("export", found, "leave it out")
    if config.power_limit_w is not None:
        raise UserError("power_limit_w", f"{config.power_limit_w:g}: a simulation draws no power", "leave it out")
