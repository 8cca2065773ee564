"""What ``engine=baseline`` refuses before anything is loaded."""

from __future__ import annotations

from harness.basics.errors import UserError
from harness.config.schema import Config


def check(config: Config) -> None:
    """Raises UserError for tensor parallelism."""
    tp = config.parallel.tp or 1
    if tp > 1:
        raise UserError(
            "parallel.tp",
            f"{tp}: the baseline spreads a large model over devices with accelerate's device_map",
            "use parallel=single",
        )
