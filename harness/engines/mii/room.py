"""``engine=mii``: the stock DeepSpeed-MII pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from harness.config.schema import Config
from harness.engines.mii import checks
from harness.engines.mii.config import MiiConfig
from harness.engines.room import Change, Passes, Room, Share, Unrecorded
from harness.engines.shared import less_memory, paged


class MiiRoom(Room):
    """See :class:`Room`."""

    name = "mii"
    config = MiiConfig
    engine = "harness.engines.mii.engine:MiiEngine"
    scores = False
    replicas = False
    passes = Passes.steps
    resume_keys = ("quantization",)
    proof_keys = ("quantization",)

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config, accelerator)

    def share(self, config: Config) -> Share:
        """A paged KV cache."""
        return paged.share(cast(MiiConfig, config.engine))

    def less_memory(self, engine: Mapping[str, Any], phase: object) -> list[Change] | None:
        """Smaller passes, a smaller KV cache."""
        return less_memory.of_paged(engine, phase)

    def refusal(self, part: Mapping[str, Any], prompt_tokens: int, output_len: int) -> str | None:
        """It takes the size of a block from its kernels and cannot use the last one; neither is written down."""
        statistics = part.get("engine_statistics")
        if not isinstance(statistics, dict) or type(statistics.get("kv_blocks")) is not int:
            raise Unrecorded("how many KV blocks there were is not in the record")
        raise Unrecorded("the size of MII's KV blocks is not in the record")


ROOM = MiiRoom()
