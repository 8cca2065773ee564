"""``engine=ds_inference``: ``deepspeed.init_inference`` over static batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from harness.config.schema import Config
from harness.engines.ds_inference import checks
from harness.engines.ds_inference.config import DsInferenceConfig
from harness.engines.known_model import KnownModel
from harness.engines.room import Change, Here, Passes, Room, Share, count, section
from harness.engines.shared import less_memory
from harness.engines.shared.attention_checks import refuse_by_its_file
from harness.engines.shared.auto_tp_families import check_auto_tp

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings


class DsInferenceRoom(Room):
    """See :class:`Room`."""

    name = "ds_inference"
    config = DsInferenceConfig
    engine = "harness.engines.ds_inference.engine:DsInferenceEngine"
    packages = ("deepspeed",)
    passes = Passes.steps
    resume_keys = ("kernel_inject",)
    proof_keys = ("kernel_inject", "cuda_graph")

    def check(self, config: Config, accelerator: str) -> None:
        """See :func:`checks.check`."""
        checks.check(config, accelerator)

    def check_model(self, known: KnownModel) -> None:
        """Its attention is plain."""
        refuse_by_its_file(known.architecture, known.max_context, self.name)

    def check_shards(self, config: Config, known: KnownModel, accelerator: str) -> None:
        """AutoTP shards the model."""
        check_auto_tp(known.tp, known.architecture.get("model_type"))

    def here(self, settings: EngineSettings[Any], capability: tuple[int, int] | None) -> Here:
        """PyTorch's kernels, or those that DeepSpeed injects."""
        if not settings.engine.kernel_inject:
            return Here("torch")
        checks.check_injection(settings.source.architecture, settings.tp)
        checks.check_injection_here()
        return Here("injected")

    def share(self, config: Config) -> Share:
        """Its cache is as large as its batch."""
        engine = cast(DsInferenceConfig, config.engine)
        return Share(tokens=engine.batch_tokens, pass_tokens=engine.batch_tokens, rows=engine.batch_size)

    def loads_whole(self, config: Config, accelerator: str) -> bool:
        """AutoTP shards a whole model."""
        return True

    def less_memory(self, engine: Mapping[str, Any], phase: object) -> list[Change] | None:
        """Smaller batches."""
        return less_memory.halved(engine, "batch_size", "batch_tokens")

    def refusal(self, part: Mapping[str, Any], prompt_tokens: int, output_len: int) -> str | None:
        """With injected kernels all rows are of one width."""
        engine = section(part, "engine")
        if not engine.get("kernel_inject"):
            return None
        width = checks.row_width(count(engine, "batch_tokens"), count(engine, "batch_size"))
        return checks.too_wide(width, prompt_tokens, output_len)


ROOM = DsInferenceRoom()
