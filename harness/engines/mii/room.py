"""``engine=mii``: the stock DeepSpeed-MII pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from harness.basics.errors import UserError
from harness.config.schema import Config
from harness.engines.mii import checks
from harness.engines.mii.config import MiiConfig
from harness.engines.room import Change, Here, Passes, Room, Share, Unrecorded
from harness.engines.shared import less_memory, paged

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings


class MiiRoom(Room):
    """See :class:`Room`."""

    name = "mii"
    config = MiiConfig
    engine = "harness.engines.mii.engine:MiiEngine"
    packages = ("deepspeed", "mii")
    install = "run bash launch/install_mii.sh"
    scores = False
    replicas = False
    passes = Passes.steps
    resume_keys = ("quantization",)
    proof_keys = ("quantization",)

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config, accelerator)

    def here(self, settings: EngineSettings[Any], capability: tuple[int, int] | None) -> Here:
        """Reads the checkpoint's headers as the engine does; a hub's is not fetched for it."""
        if importlib.util.find_spec("mii") is None:
            raise UserError("engine", "mii is not installed", self.install)
        if settings.source.architecture:
            from harness.engines.mii.settings import local_checkpoint, refuse_unsupported

            source = settings.source if settings.source.kind in ("hub", "described") else local_checkpoint(settings)
            refuse_unsupported(settings, source, capability)
        return Here("mii")

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
