"""``engine=fastgen``: Dynamic SplitFuse over a paged KV cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from harness.config.schema import Config, EngineConfig
from harness.engines.fastgen import checks
from harness.engines.fastgen.config import FastGenConfig, Kernels
from harness.engines.fastgen.runners import choice
from harness.engines.known_model import KnownModel
from harness.engines.room import Change, Here, Passes, Room, Share, Unrecorded, count, section
from harness.engines.shared import less_memory, paged
from harness.engines.shared.attention_checks import refuse_by_its_file
from harness.engines.shared.kv_blocks import refusal

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings

BLOCK_NOTE = re.compile(r"the kernels' KV blocks are of ([0-9]+) tokens")  # FastGenEngine.load()


class FastGenRoom(Room):
    """See :class:`Room`."""

    name = "fastgen"
    config: type[EngineConfig] = FastGenConfig
    engine = "harness.engines.fastgen.engine:FastGenEngine"
    passes = Passes.steps
    resume_keys: tuple[str, ...] = ("kernels", "quantization")
    proof_keys: tuple[str, ...] | None = ("quantization", "kv_block_size")

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config, accelerator)

    def check_model(self, known: KnownModel) -> None:
        """Its attention is plain."""
        refuse_by_its_file(known.architecture, known.max_context, self.name)

    def check_shards(self, config: Config, known: KnownModel, accelerator: str) -> None:
        """See :func:`choice.check`."""
        choice.check(cast(FastGenConfig, config.engine), known, accelerator)

    def here(self, settings: EngineSettings[Any], capability: tuple[int, int] | None) -> Here:
        """See :func:`choice.foretell`."""
        known = KnownModel.of(settings.source, settings.dtype, settings.tp, settings.max_context)
        accelerator = "cuda" if settings.device.startswith("cuda") else "cpu"
        taken, reasons = choice.foretell(settings.engine, known, accelerator, capability)
        return Here(taken.value, {kernels.value: why for kernels, why in reasons.items()})

    def share(self, config: Config) -> Share:
        """A paged KV cache."""
        return paged.share(cast(FastGenConfig, config.engine))

    def loads_whole(self, config: Config, accelerator: str) -> bool:
        """PyTorch's kernels do, which ``auto`` takes for shards on a CPU."""
        kernels = cast(FastGenConfig, config.engine).kernels
        return kernels is Kernels.torch or (kernels is Kernels.auto and accelerator == "cpu")

    def less_memory(self, engine: Mapping[str, Any], phase: object) -> list[Change] | None:
        """Smaller passes, a smaller KV cache."""
        return less_memory.of_paged(engine, phase)

    def refusal(self, part: Mapping[str, Any], prompt_tokens: int, output_len: int) -> str | None:
        """The KV cache must hold a request to its end."""
        engine, dp = section(part, "engine"), count(section(part, "parallel"), "dp")
        statistics = part.get("engine_statistics")
        if not isinstance(statistics, dict) or type(total := statistics.get("kv_blocks")) is not int:
            raise Unrecorded("how many KV blocks there were is not in the record")
        size = count(engine, "kv_block_size")
        notes = part.get("notes")
        for note in notes if isinstance(notes, list) else ():
            if match := BLOCK_NOTE.search(str(note)):
                size = int(match[1])
        # The replicas' blocks are in the record as a sum, and one may have had fewer than another.
        return refusal(prompt_tokens, output_len, max(size, 1), total if dp == 1 else total // dp // 2)


ROOM = FastGenRoom()
